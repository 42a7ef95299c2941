// Lists of tensors -> validated slices that kernels can walk: counts, dtypes, devices, shapes, layouts and aliasing are
// checked here, before anything is written, for every op and behind both doors.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "core/lists.h"

namespace unlearn_ext {

// What a list may hold. The lists of kind parameters and importances decide the dtype of their scalars' row.
enum class Holds {
  parameters,    // float32, float64, float16 or bfloat16
  like,          // the parameters' dtype
  accumulators,  // float32, float64 with float64 parameters
  importances,   // float32 or float64, the same in every list of this kind
  bits,          // packed masks, uint8 [ceil(numel / 8)], row-major
};

struct List {
  const char* name;
  at::TensorList tensors;
  Holds holds;
  bool written = false;
};

inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      return std::nullopt;
  }
}

inline at::ScalarType accumulator_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline int64_t packed_bytes(int64_t numel) { return (numel + 7) / 8; }

// Masks that wait, unpacked, for a common launch are at most this many scalars together, a byte each.
inline constexpr int64_t kMostWaiting = int64_t{1} << 26;

inline bool is_row_major(const at::Tensor& t) { return t.is_contiguous(); }

// Whether b's memory can be walked like a's. Axes of extent 1 have no stride worth comparing; a lazily negated view
// holds other values than it stands for.
inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_neg() != b.is_neg()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// Raw writes bypass autograd; the version counter still has to tell saved tensors, and callers who compare it.
inline void bump_version(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

inline void require_usable(const char* op, const char* name, int64_t index, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.defined(), op, ": ", name, "[", index, "] must be a tensor, got an undefined one");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, op, ": ", name, "[", index, "] must be dense (strided), got layout ",
                    t.layout());
}

// Several tensors of one device and dtype, walked together.
template <int N>
struct Group {
  c10::Device device;
  at::ScalarType type;
  std::vector<Slice<N>> slices;
  std::vector<int64_t> positions;  // of the slices in the lists

  DType dtype() const { return *dtype_of(type); }
  int64_t count() const { return static_cast<int64_t>(slices.size()); }
};

// One address range of an argument, for the aliasing check.
struct Extent {
  uintptr_t begin, end;
  const at::Tensor* tensor;
  const char* name;
  int64_t index;
  bool written;
};

// Calls f(address) for every element of a tensor until f returns false. Only for layouts that strides cannot decide.
template <class F>
void for_each_address(const at::Tensor& t, const F& f) {
  const auto base = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  std::vector<int64_t> at(static_cast<size_t>(t.dim()), 0);
  int64_t offset = 0;
  for (int64_t n = t.numel(); n > 0; --n) {
    if (!f(base + static_cast<uintptr_t>(offset) * t.element_size())) return;
    for (int64_t axis = t.dim() - 1; axis >= 0; --axis) {
      auto& index = at[static_cast<size_t>(axis)];
      offset += t.stride(axis);
      if (++index < t.size(axis)) break;
      offset -= index * t.stride(axis);
      index = 0;
    }
  }
}

// Whether strides alone rule out that two elements share memory: each axis steps over all that the finer ones reach.
inline bool steps_over_itself(const at::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, steps
  for (int64_t axis = 0; axis < t.dim(); ++axis)
    if (t.size(axis) > 1) axes.emplace_back(t.stride(axis), t.size(axis) - 1);
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;
  for (const auto& [stride, steps] : axes) {
    if (stride <= reach) return false;
    reach += stride * steps;
  }
  return true;
}

// Whether two elements of one tensor share memory, exactly. Only strides that interleave take a look at every address.
inline bool overlaps_itself(const at::Tensor& t) {
  const at::MemOverlap quick = at::has_internal_overlap(t);
  if (quick != at::MemOverlap::TooHard) return quick == at::MemOverlap::Yes;
  if (steps_over_itself(t)) return false;
  std::vector<uintptr_t> addresses;
  addresses.reserve(static_cast<size_t>(t.numel()));
  for_each_address(t, [&](uintptr_t address) {
    addresses.push_back(address);
    return true;
  });
  std::sort(addresses.begin(), addresses.end());
  return std::adjacent_find(addresses.begin(), addresses.end()) != addresses.end();
}

// Whether two arguments share a byte, exactly. Their address ranges are known to intersect.
inline bool share_memory(const Extent& a, const Extent& b) {
  if (a.tensor->is_non_overlapping_and_dense() && b.tensor->is_non_overlapping_and_dense()) return true;
  const uintptr_t begin = std::max(a.begin, b.begin), end = std::min(a.end, b.end);
  std::vector<bool> taken(end - begin, false);
  const auto bytes_within = [&](const at::Tensor& t, const auto& f) {
    for_each_address(t, [&](uintptr_t address) {
      for (uintptr_t byte = std::max(address, begin); byte < std::min(address + t.element_size(), end); ++byte)
        if (!f(byte - begin)) return false;
      return true;
    });
  };
  bytes_within(*a.tensor, [&](size_t byte) { return taken[byte] = true; });
  bool shared = false;
  bytes_within(*b.tensor, [&](size_t byte) { return !(shared = taken[byte]); });
  return shared;
}

// Written memory may be reached through one argument only.
inline void require_no_aliases(const char* op, std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<const Extent*> open[2];  // ranges that reach past the current one: read, written
  for (const Extent& e : extents) {
    for (const bool written : {false, true}) {
      std::vector<const Extent*>& others = open[written];
      std::erase_if(others, [&](const Extent* other) { return other->end <= e.begin; });
      if (!written && !e.written) continue;
      for (const Extent* other : others) {
        const Extent &w = e.written ? e : *other, &r = e.written ? *other : e;
        TORCH_CHECK_VALUE(!share_memory(e, *other), op, ": ", w.name, "[", w.index,
                          "] must not share memory with another argument, got memory of ", r.name, "[", r.index, "]");
      }
    }
    open[e.written].push_back(&e);
  }
}

inline void add_extent(std::vector<Extent>& extents, const char* name, int64_t index, const at::Tensor& t,
                       bool written) {
  if (t.numel() == 0) return;
  int64_t span = 1;
  for (int64_t i = 0; i < t.dim(); ++i) span += (t.size(i) - 1) * t.stride(i);
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  extents.push_back({begin, begin + static_cast<uintptr_t>(span) * t.element_size(), &t, name, index, written});
}

// Before any address is taken: a lazy clone (torch._lazy_clone) that is going to be written gets memory of its own
// here.
inline void require_writable(const char* op, const char* name, int64_t index, const at::Tensor& t) {
  TORCH_CHECK_VALUE(!t.is_neg(), op, ": ", name, "[", index, "] must hold its values, got a lazily negated view");
  TORCH_CHECK_VALUE(!overlaps_itself(t), op, ": ", name, "[", index, "] must not overlap itself, got strides ",
                    t.strides());
  if (t.numel() != 0) t.mutable_data_ptr();
}

// The lists of one call as groups of slices, with copies in place of tensors whose layout does not match. finish()
// brings results back from such copies.
template <int N>
class Paired {
 public:
  using Repack = std::vector<at::Tensor> (*)(const std::vector<at::Tensor>& bits,
                                             const std::vector<at::Tensor>& orders);

  Paired(const char* op, std::array<List, N> lists, Repack repack) : op_(op), lists_(lists), repack_(repack) {
    const at::TensorList& first = lists_[0].tensors;
    for (const List& list : lists_)
      TORCH_CHECK_VALUE(list.tensors.size() == first.size(), op, ": ", list.name, " must have ", first.size(),
                        " tensors like ", lists_[0].name, ", got ", list.tensors.size());
    std::vector<Extent> extents;
    extents.reserve(N * first.size());
    for (size_t t = 0; t < first.size(); ++t) check(t);
    for (size_t t = 0; t < first.size(); ++t)
      for (const List& list : lists_)
        add_extent(extents, list.name, static_cast<int64_t>(t), list.tensors[t], list.written);
    require_no_aliases(op, extents);
    for (size_t t = 0; t < first.size(); ++t) add(t);
    repack_waiting();
  }

  std::vector<Group<N>>& groups() { return groups_; }

  void finish() {
    for (auto& [to, from] : write_back_) to.copy_(from);
    for (const List& list : lists_)
      if (list.written)
        for (const at::Tensor& t : list.tensors) bump_version(t);
  }

 private:
  void check(size_t t) {
    const at::Tensor& lead = lists_[0].tensors[t];
    const auto index = static_cast<int64_t>(t);
    for (const List& list : lists_) require_usable(op_, list.name, index, list.tensors[t]);
    const at::ScalarType type = row_type(t);
    for (const List& list : lists_) {
      const at::Tensor& tensor = list.tensors[t];
      const at::ScalarType got = tensor.scalar_type();
      switch (list.holds) {
        case Holds::parameters:
          TORCH_CHECK_TYPE(dtype_of(got).has_value(), op_, ": ", list.name, "[", index,
                           "] must be float32, float64, float16 or bfloat16, got ", got);
          break;
        case Holds::importances:
          TORCH_CHECK_TYPE(got == at::kFloat || got == at::kDouble, op_, ": ", list.name, "[", index,
                           "] must be float32 or float64, got ", got);
          [[fallthrough]];
        case Holds::like:
          TORCH_CHECK_TYPE(got == type, op_, ": ", list.name, "[", index, "] must be ", type, ", got ", got);
          break;
        case Holds::accumulators:
          TORCH_CHECK_TYPE(got == accumulator_type(type), op_, ": ", list.name, "[", index, "] must be ",
                           accumulator_type(type), " for ", type, " values, got ", got);
          break;
        case Holds::bits:
          TORCH_CHECK_TYPE(got == at::kByte, op_, ": ", list.name, "[", index,
                           "] must be a packed mask (uint8, see pack_mask), got ", got);
          TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.numel() == packed_bytes(lead.numel()), op_, ": ", list.name,
                            "[", index, "] must have shape [", packed_bytes(lead.numel()), "], one bit per scalar of ",
                            lists_[0].name, "[", index, "], got ", tensor.sizes());
          break;
      }
      if (list.holds != Holds::bits)
        TORCH_CHECK_VALUE(tensor.sizes() == lead.sizes(), op_, ": ", list.name, "[", index, "] must have the shape ",
                          lead.sizes(), " of ", lists_[0].name, "[", index, "], got ", tensor.sizes());
      TORCH_CHECK_VALUE(tensor.device() == lead.device(), op_, ": ", list.name, "[", index, "] must be on ",
                        lead.device(), " like ", lists_[0].name, "[", index, "], got ", tensor.device());
      if (list.written) require_writable(op_, list.name, index, tensor);
    }
  }

  at::ScalarType row_type(size_t t) const {
    for (const List& list : lists_)
      if (list.holds == Holds::parameters || list.holds == Holds::importances) return list.tensors[t].scalar_type();
    return at::kFloat;
  }

  void add(size_t t) {
    const at::Tensor& lead = lists_[0].tensors[t];
    // The memory order everything else is brought into.
    at::Tensor order = lead;
    if (!lead.is_non_overlapping_and_dense()) order = keep(lead.contiguous());
    const size_t g = group_of(lead.device(), row_type(t)), s = groups_[g].slices.size();
    Slice<N>& slice = groups_[g].slices.emplace_back();
    slice.numel = lead.numel();
    for (int l = 0; l < N; ++l) {
      const List& list = lists_[static_cast<size_t>(l)];
      const at::Tensor& tensor = list.tensors[t];
      if (list.holds != Holds::bits) {
        slice.data[l] = values_for(tensor, order, list.written);
        continue;
      }
      const at::Tensor dense = keep(tensor.contiguous());
      slice.data[l] = const_cast<void*>(dense.const_data_ptr());
      if (!is_row_major(order)) wait_for_repack(dense, order, {g, s, l});
    }
    groups_[g].positions.push_back(static_cast<int64_t>(t));
  }

  // Bits to be brought into another memory order are collected, so that a model in channels_last takes two launches
  // rather than two per tensor; no more of them than kMostWaiting scalars, and of one device.
  struct Waiting {
    size_t group, slice;
    int list;
  };

  void wait_for_repack(const at::Tensor& bits, const at::Tensor& order, Waiting place) {
    if (!waiting_.empty() &&
        (bits.device() != waiting_bits_[0].device() || waiting_scalars_ + order.numel() > kMostWaiting))
      repack_waiting();
    waiting_.push_back(place);
    waiting_bits_.push_back(bits);
    waiting_orders_.push_back(order);
    waiting_scalars_ += order.numel();
  }

  void repack_waiting() {
    if (waiting_.empty()) return;
    const std::vector<at::Tensor> repacked = repack_(waiting_bits_, waiting_orders_);
    for (size_t i = 0; i < waiting_.size(); ++i) {
      const Waiting& to = waiting_[i];
      groups_[to.group].slices[to.slice].data[to.list] = const_cast<void*>(keep(repacked[i]).const_data_ptr());
    }
    waiting_.clear(), waiting_bits_.clear(), waiting_orders_.clear();
    waiting_scalars_ = 0;
  }

  void* values_for(const at::Tensor& tensor, const at::Tensor& order, bool written) {
    at::Tensor source = tensor;
    if (!same_layout(tensor, order)) {
      source = keep(at::empty_strided(order.sizes(), order.strides(), tensor.options().requires_grad(false)));
      source.copy_(tensor.detach());
      if (written) write_back_.emplace_back(tensor.detach(), source);
    }
    return const_cast<void*>(source.const_data_ptr());
  }

  const at::Tensor& keep(at::Tensor t) { return kept_.emplace_back(std::move(t)); }

  size_t group_of(c10::Device device, at::ScalarType type) {
    for (size_t g = 0; g < groups_.size(); ++g)
      if (groups_[g].device == device && groups_[g].type == type) return g;
    groups_.push_back(Group<N>{device, type, {}, {}});
    return groups_.size() - 1;
  }

  const char* op_;
  std::array<List, N> lists_;
  Repack repack_;
  std::vector<Group<N>> groups_;
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back_;
  std::vector<Waiting> waiting_;
  std::vector<at::Tensor> waiting_bits_, waiting_orders_;
  int64_t waiting_scalars_ = 0;
};

}  // namespace unlearn_ext
