// Checks of scalar arguments, and the walk over groups of tensors that every list op takes.
#pragma once

#include <cmath>

#include "torch/marshal.h"
#include "torch/pack.h"
#include "torch/run.h"

namespace unlearn_ext {
namespace {

// Constants reach most kernels as float, so they have to be finite there too.
bool is_float(double value) { return std::isfinite(static_cast<float>(value)); }

void require_finite(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(is_float(value), op, ": ", name, " must be finite in float32, got ", value);
}

void require_non_negative(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(is_float(value) && value >= 0, op, ": ", name, " must be finite in float32 and non-negative, got ",
                    value);
}

// Every tensor's device is looked at before the lists are paired, so that a call on an unsupported one says so.
template <size_t N, class F>
void for_each_group(const char* op, const List (&lists)[N], const F& f) {
  std::array<List, N> all;
  std::copy_n(lists, N, all.begin());
  for (const List& list : all)
    for (const at::Tensor& t : list.tensors)
      if (t.defined()) require_supported(op, t.device());
  Paired<static_cast<int>(N)> paired(op, all, &repack);
  for (auto& group : paired.groups()) f(group);
  paired.finish();
}

}  // namespace
}  // namespace unlearn_ext
