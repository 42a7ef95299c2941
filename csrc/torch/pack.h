// Bool masks and their packed form.
#pragma once

#include "kernels/pack.h"
#include "torch/doors.h"
#include "torch/marshal.h"
#include "torch/run.h"

namespace unlearn_ext {
namespace {

at::Tensor pack_mask(const at::Tensor& mask) {
  require_supported("pack_mask", mask.device());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "pack_mask: mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.layout() == at::kStrided, "pack_mask: mask must be dense (strided), got layout ",
                    mask.layout());
  const at::Tensor flags = mask.contiguous();
  at::Tensor packed = at::empty({packed_bytes(mask.numel())}, mask.options().dtype(at::kByte));
  run("pack_mask", mask.device(), [&]<Backend B>(const Exec& exec) {
    return pack_mask<B>(static_cast<const uint8_t*>(flags.const_data_ptr()), packed.mutable_data_ptr<uint8_t>(),
                        flags.numel(), exec);
  });
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
  run("unpack_mask", packed.device(), [&]<Backend B>(const Exec& exec) {
    return unpack_mask<B>(bits.const_data_ptr<uint8_t>(), static_cast<uint8_t*>(mask.mutable_data_ptr()), numel, exec);
  });
  return mask;
}

// Row-major mask bits in the memory order of `order`.
at::Tensor repack(const at::Tensor& bits, const at::Tensor& order) {
  at::Tensor flags = at::empty_strided(order.sizes(), order.strides(), bits.options().dtype(at::kBool));
  flags.copy_(unpack_mask(bits, order.sizes()));
  return pack_mask(flags.as_strided({flags.numel()}, {1}));
}

using PackOps = OpList<Op<"pack_mask(Tensor mask) -> Tensor", &pack_mask>,
                       Op<"unpack_mask(Tensor packed, SymInt[] shape) -> Tensor", &unpack_mask>>;

}  // namespace
}  // namespace unlearn_ext
