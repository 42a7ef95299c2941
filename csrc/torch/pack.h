// Bool masks and their packed form.
#pragma once

#include <ostream>

#include "kernels/pack.h"
#include "torch/doors.h"
#include "torch/marshal.h"
#include "torch/run.h"

namespace unlearn_ext {
namespace {

Slice<2> mask_slice(const at::Tensor& flags, const at::Tensor& packed) {
  return {{const_cast<void*>(flags.const_data_ptr()), const_cast<void*>(packed.const_data_ptr())}, flags.numel()};
}

// An argument as messages name it: mask, or masks[3] of a list.
struct Named {
  const char* name;
  int64_t index = -1;
};

std::ostream& operator<<(std::ostream& out, const Named& of) {
  out << of.name;
  return of.index < 0 ? out : out << '[' << of.index << ']';
}

void require_flags(const Named& name, const at::Tensor& mask) {
  require_supported("pack_mask", mask.device());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "pack_mask: ", name, " must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.layout() == at::kStrided, "pack_mask: ", name, " must be dense (strided), got layout ",
                    mask.layout());
}

void require_bits(const Named& name, const at::Tensor& packed, const Named& shape_name, at::IntArrayRef shape) {
  require_supported("unpack_mask", packed.device());
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "unpack_mask: ", name, " must be uint8, got ",
                   packed.scalar_type());
  TORCH_CHECK_VALUE(packed.layout() == at::kStrided, "unpack_mask: ", name, " must be dense (strided), got layout ",
                    packed.layout());
  int64_t numel = 1;
  for (const int64_t extent : shape) {
    TORCH_CHECK_VALUE(extent >= 0, "unpack_mask: ", shape_name, " must be non-negative, got ", shape);
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(numel, extent, &numel), "unpack_mask: ", shape_name,
                      " must be addressable, got ", shape);
  }
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.numel() == packed_bytes(numel), "unpack_mask: ", name,
                    " must have shape [", packed_bytes(numel), "] for ", numel, " scalars, got ", packed.sizes());
}

at::Tensor new_packed(const at::Tensor& mask) {
  return at::empty({packed_bytes(mask.numel())}, mask.options().dtype(at::kByte));
}

at::Tensor new_flags(const at::Tensor& packed, at::IntArrayRef shape) {
  return at::empty(shape, packed.options().dtype(at::kBool));
}

void pack_slices(c10::Device device, const Slice<2>* slices, int64_t count) {
  run("pack_mask", device, [&]<Backend B>(const Exec& exec) { return pack_masks<B>(slices, count, exec); });
}

void unpack_slices(c10::Device device, const Slice<2>* slices, int64_t count) {
  run("unpack_mask", device, [&]<Backend B>(const Exec& exec) { return unpack_masks<B>(slices, count, exec); });
}

at::Tensor pack_mask(const at::Tensor& mask) {
  require_flags({"mask"}, mask);
  const at::Tensor flags = mask.contiguous();
  at::Tensor packed = new_packed(mask);
  const Slice<2> slice = mask_slice(flags, packed);
  pack_slices(mask.device(), &slice, 1);
  return packed;
}

at::Tensor unpack_mask(const at::Tensor& packed, at::IntArrayRef shape) {
  require_bits({"packed"}, packed, {"shape"}, shape);
  const at::Tensor bits = packed.contiguous();
  at::Tensor mask = new_flags(packed, shape);
  const Slice<2> slice = mask_slice(mask, bits);
  unpack_slices(packed.device(), &slice, 1);
  return mask;
}

// Calls launch(device, slices, count) for the tensors of one device after the other, slice_of(dense, t) being the slice
// of the t-th, row-major in `dense`. Copies of tensors that are not row-major wait for their launch, no more than
// kMostWaiting bytes of them.
template <class SliceOf, class Launch>
void for_each_device(at::TensorList tensors, const SliceOf& slice_of, const Launch& launch) {
  std::vector<bool> done(tensors.size());
  for (size_t first = 0; first < tensors.size(); ++first) {
    if (done[first]) continue;
    const c10::Device device = tensors[first].device();
    std::vector<Slice<2>> slices;
    std::vector<at::Tensor> copies;
    int64_t copied = 0;
    const auto flush = [&] {
      if (!slices.empty()) launch(device, slices.data(), static_cast<int64_t>(slices.size()));
      slices.clear(), copies.clear();
      copied = 0;
    };
    for (size_t t = first; t < tensors.size(); ++t) {
      if (tensors[t].device() != device) continue;
      done[t] = true;
      const at::Tensor dense = tensors[t].contiguous();
      slices.push_back(slice_of(dense, t));
      if (dense.is_same(tensors[t])) continue;
      copies.push_back(dense);
      copied += dense.numel();
      if (copied > kMostWaiting) flush();
    }
    flush();
  }
}

std::vector<at::Tensor> pack_mask_list(at::TensorList masks) {
  for (size_t t = 0; t < masks.size(); ++t) {
    const Named name{"masks", static_cast<int64_t>(t)};
    TORCH_CHECK_VALUE(masks[t].defined(), "pack_mask: ", name, " must be a tensor, got an undefined one");
    require_flags(name, masks[t]);
  }
  std::vector<at::Tensor> packed;
  for (const at::Tensor& mask : masks) packed.push_back(new_packed(mask));
  for_each_device(masks, [&](const at::Tensor& flags, size_t t) { return mask_slice(flags, packed[t]); }, &pack_slices);
  return packed;
}

std::vector<at::Tensor> unpack_mask_list(at::TensorList packed, std::vector<std::vector<int64_t>> shapes) {
  TORCH_CHECK_VALUE(shapes.size() == packed.size(), "unpack_mask: shapes must have ", packed.size(),
                    " entries like packed, got ", shapes.size());
  for (size_t t = 0; t < packed.size(); ++t) {
    const auto index = static_cast<int64_t>(t);
    const Named name{"packed", index};
    TORCH_CHECK_VALUE(packed[t].defined(), "unpack_mask: ", name, " must be a tensor, got an undefined one");
    require_bits(name, packed[t], {"shapes", index}, shapes[t]);
  }
  std::vector<at::Tensor> masks;
  for (size_t t = 0; t < packed.size(); ++t) masks.push_back(new_flags(packed[t], shapes[t]));
  for_each_device(packed, [&](const at::Tensor& bits, size_t t) { return mask_slice(masks[t], bits); }, &unpack_slices);
  return masks;
}

// Row-major mask bits in the memory order of `orders`, which are dense; all on one device. Two launches for the list.
std::vector<at::Tensor> repack(const std::vector<at::Tensor>& bits, const std::vector<at::Tensor>& orders) {
  const auto count = static_cast<int64_t>(bits.size());
  const c10::Device device = bits[0].device();
  std::vector<at::Tensor> flags, packed;
  std::vector<Slice<2>> slices;
  for (size_t t = 0; t < bits.size(); ++t) {
    flags.push_back(at::empty(orders[t].sizes(), bits[t].options().dtype(at::kBool)));
    slices.push_back(mask_slice(flags[t], bits[t]));
  }
  unpack_slices(device, slices.data(), count);
  for (size_t t = 0; t < bits.size(); ++t) {
    at::Tensor ordered = at::empty_strided(orders[t].sizes(), orders[t].strides(), flags[t].options());
    flags[t] = ordered.copy_(flags[t]);
    packed.push_back(at::empty_like(bits[t]));
    slices[t] = mask_slice(flags[t], packed[t]);
  }
  pack_slices(device, slices.data(), count);
  return packed;
}

// Shapes of a list are those of parameters, which torch.compile takes for constants: not SymInt[][], which its boxed
// calls cannot hand to a kernel.
using PackOps = OpList<Op<"pack_mask(Tensor mask) -> Tensor", &pack_mask>,
                       Op<"pack_mask.list(Tensor[] masks) -> Tensor[]", &pack_mask_list>,
                       Op<"unpack_mask(Tensor packed, SymInt[] shape) -> Tensor", &unpack_mask>,
                       Op<"unpack_mask.list(Tensor[] packed, int[][] shapes) -> Tensor[]", &unpack_mask_list>>;

}  // namespace
}  // namespace unlearn_ext
