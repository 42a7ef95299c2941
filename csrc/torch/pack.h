// Bool masks and their packed form.
#pragma once

#include "kernels/pack.h"
#include "torch/doors.h"
#include "torch/marshal.h"
#include "torch/run.h"

namespace unlearn_ext {
namespace {

Slice<2> mask_slice(const at::Tensor& flags, const at::Tensor& packed) {
  return {{const_cast<void*>(flags.const_data_ptr()), const_cast<void*>(packed.const_data_ptr())}, flags.numel()};
}

at::Tensor pack_mask(const at::Tensor& mask) {
  require_supported("pack_mask", mask.device());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "pack_mask: mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.layout() == at::kStrided, "pack_mask: mask must be dense (strided), got layout ",
                    mask.layout());
  const at::Tensor flags = mask.contiguous();
  at::Tensor packed = at::empty({packed_bytes(mask.numel())}, mask.options().dtype(at::kByte));
  const Slice<2> slice = mask_slice(flags, packed);
  run("pack_mask", mask.device(), [&]<Backend B>(const Exec& exec) { return pack_masks<B>(&slice, 1, exec); });
  return packed;
}

at::Tensor unpack_mask(const at::Tensor& packed, at::IntArrayRef shape) {
  require_supported("unpack_mask", packed.device());
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "unpack_mask: packed must be uint8, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.layout() == at::kStrided, "unpack_mask: packed must be dense (strided), got layout ",
                    packed.layout());
  int64_t numel = 1;
  for (const int64_t extent : shape) {
    TORCH_CHECK_VALUE(extent >= 0, "unpack_mask: shape must be non-negative, got ", shape);
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(numel, extent, &numel), "unpack_mask: shape must be addressable, got ",
                      shape);
  }
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.numel() == packed_bytes(numel), "unpack_mask: packed must have shape [",
                    packed_bytes(numel), "] for ", numel, " scalars, got ", packed.sizes());
  const at::Tensor bits = packed.contiguous();
  at::Tensor mask = at::empty(shape, packed.options().dtype(at::kBool));
  const Slice<2> slice = mask_slice(mask, bits);
  run("unpack_mask", packed.device(), [&]<Backend B>(const Exec& exec) { return unpack_masks<B>(&slice, 1, exec); });
  return mask;
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
  run("unpack_mask", device, [&]<Backend B>(const Exec& exec) { return unpack_masks<B>(slices.data(), count, exec); });
  for (size_t t = 0; t < bits.size(); ++t) {
    at::Tensor ordered = at::empty_strided(orders[t].sizes(), orders[t].strides(), flags[t].options());
    flags[t] = ordered.copy_(flags[t]);
    packed.push_back(at::empty_like(bits[t]));
    slices[t] = mask_slice(flags[t], packed[t]);
  }
  run("pack_mask", device, [&]<Backend B>(const Exec& exec) { return pack_masks<B>(slices.data(), count, exec); });
  return packed;
}

using PackOps = OpList<Op<"pack_mask(Tensor mask) -> Tensor", &pack_mask>,
                       Op<"unpack_mask(Tensor packed, SymInt[] shape) -> Tensor", &unpack_mask>>;

}  // namespace
}  // namespace unlearn_ext
