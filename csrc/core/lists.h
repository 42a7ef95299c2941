// What a list op is: several lists of tensors walked in step, one formula per scalar.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>

#include "core/dtype.h"

namespace unlearn_ext {

// Storage type of every list an op walks over, written lists first.
template <class... T>
struct Row {
  static constexpr int size = sizeof...(T);
  static constexpr int smallest = static_cast<int>(std::min({sizeof(T)...}));
  static constexpr int largest = static_cast<int>(std::max({sizeof(T)...}));
  static constexpr int bytes = static_cast<int>((sizeof(T) + ...));  // of a scalar of every list
  using indices = std::index_sequence_for<T...>;
  template <size_t I>
  using at = std::tuple_element_t<I, std::tuple<T...>>;
};

// The t-th tensor of every list: one address per list and the common length.
template <int N>
struct Slice {
  void* data[N];
  int64_t numel;
};

// Masks are read in words of this many scalars, so ranges handed to threads start at multiples of it.
inline constexpr int64_t kWord = 64;

// For `keep` of apply_at(): every result is stored that op does not hold back.
using Always = std::true_type;

// Applies op to one scalar of every list and stores the first Op::writes results where `keep` is set and, for an op
// that returns a bool, where it is true. Elsewhere the stored bits stay as they are, whatever they encode.
template <class R, class Op, class Keep, size_t... I, class... P>
UNLEARN_HD void apply_at(const Op& op, Keep keep, std::index_sequence<I...>, P*... element) {
  typename Op::acc_type value[] = {typename Op::acc_type(*element)...};
  constexpr bool kDecides = std::is_same_v<decltype(op(value[I]...)), bool>;
  bool stored = keep;
  if constexpr (kDecides)
    stored = op(value[I]...) & stored;
  else
    op(value[I]...);
  (
      [&] {
        using T = typename R::template at<I>;
        if constexpr (I >= static_cast<size_t>(Op::writes))
          return;
        else if constexpr (std::is_same_v<Keep, Always> && !kDecides)
          *element = store_as<T>(value[I]);
        else
          *element = choose<T>(stored, store_as<T>(value[I]), *element);
      }(),
      ...);
}

// Ops that act where the mask is clear say so with a member `on_cleared`.
template <class Op>
constexpr bool kOnCleared = requires { Op::on_cleared; };

// Ops whose results do not depend on what was there say so with a member `overwrites`.
template <class Op>
constexpr bool kOverwrites = requires { Op::overwrites; };

}  // namespace unlearn_ext
