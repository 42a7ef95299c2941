// An order for tasks of unequal size. Unnamed namespace: see apply_cpu.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace unlearn_ext {
namespace {

// The order in which to hand tasks of unequal size to parallel_for, which gives each thread consecutive ones: steps of
// the golden ratio spread small and large tasks evenly over every stretch.
struct Shuffled {
  int64_t n, step;

  explicit Shuffled(int64_t tasks)
      : n(tasks), step(std::max<int64_t>(1, static_cast<int64_t>(0.618 * static_cast<double>(tasks)))) {
    while (greatest_common_divisor(step, n) != 1) ++step;
  }
  int64_t operator[](int64_t i) const { return i * step % n; }

 private:
  static int64_t greatest_common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }
};

}  // namespace
}  // namespace unlearn_ext
