// Checks of scalar arguments, and the walk over groups of tensors that every list op takes.
#pragma once

#include <cmath>

#include "torch/marshal.h"
#include "torch/pack.h"
#include "torch/run.h"

namespace unlearn_ext {
namespace {

void require_finite(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": ", name, " must be finite, got ", value);
}

void require_non_negative(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, op, ": ", name, " must be finite and non-negative, got ",
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
