// One list of ops, two doors: torch.ops.unlearn_ext.* through the dispatcher, _C.* through pybind11. Names, order and
// defaults of arguments come from the schema string, which is therefore written once.
#pragma once

#include <string_view>
#include <tuple>
#include <utility>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

namespace unlearn_ext {

// A string literal as a template argument.
template <size_t N>
struct Literal {
  char text[N];
  constexpr Literal(const char (&from)[N]) { std::copy_n(from, N, text); }
  constexpr std::string_view view() const { return {text, N - 1}; }
};

struct Argument {
  std::string_view type{}, name{}, value{};  // value: the default, empty if there is none
  bool is_marker = false;                    // the '*' before keyword-only arguments
};

constexpr std::string_view trim(std::string_view s) {
  while (!s.empty() && s.front() == ' ') s.remove_prefix(1);
  while (!s.empty() && s.back() == ' ') s.remove_suffix(1);
  return s;
}

// The text between the outer parentheses of a schema. Alias marks such as (a!) nest inside.
constexpr std::string_view argument_text(std::string_view schema) {
  const size_t open = schema.find('(');
  size_t close = open;
  for (int depth = 0; close < schema.size(); ++close) {
    depth += schema[close] == '(' ? 1 : schema[close] == ')' ? -1 : 0;
    if (depth == 0) break;
  }
  return schema.substr(open + 1, close - open - 1);
}

constexpr size_t count_arguments(std::string_view schema) {
  const std::string_view text = argument_text(schema);
  return trim(text).empty() ? 0 : 1 + static_cast<size_t>(std::count(text.begin(), text.end(), ','));
}

constexpr Argument argument_at(std::string_view schema, size_t index) {
  std::string_view text = argument_text(schema);
  for (; index > 0; --index) text.remove_prefix(text.find(',') + 1);
  text = trim(text.substr(0, text.find(',')));
  if (text == "*") return {.is_marker = true};
  const size_t equals = text.find('=');
  const std::string_view declared = text.substr(0, equals);
  const size_t space = declared.rfind(' ');
  return {declared.substr(0, space), declared.substr(space + 1),
          equals == std::string_view::npos ? std::string_view{} : text.substr(equals + 1)};
}

// An op: its schema and the host function behind it.
template <Literal kSchema, auto kFunction>
struct Op {
  static constexpr std::string_view schema = kSchema.view();
  static constexpr auto function = kFunction;

  static std::string qualified_name() { return std::string(schema.substr(0, schema.find('('))); }
  static std::string overload() {
    const size_t dot = schema.find('.');
    return dot < schema.find('(') ? std::string(schema.substr(dot + 1, schema.find('(') - dot - 1)) : std::string();
  }
  static std::string name() { return std::string(schema.substr(0, schema.find_first_of(".("))); }
};

// pybind11 makes values, the dispatcher hands out views.
template <class T>
struct Owned {
  using type = std::decay_t<T>;
};
template <class T>
struct Owned<c10::ArrayRef<T>> {
  using type = std::vector<T>;
};

template <size_t I, class O>
auto python_argument() {
  constexpr Argument argument = argument_at(O::schema, I);
  if constexpr (argument.is_marker) {
    return pybind11::kw_only();
  } else {
    static const std::string name(argument.name);
    if constexpr (argument.value.empty()) {
      return pybind11::arg(name.c_str());
    } else if constexpr (argument.type == "bool") {
      return pybind11::arg(name.c_str()) = argument.value == "True";
    } else if constexpr (argument.type == "int") {
      return pybind11::arg(name.c_str()) = std::stoll(std::string(argument.value));
    } else {
      return pybind11::arg(name.c_str()) = std::stod(std::string(argument.value));
    }
  }
}

// Whether a tensor is what kernels take it for: no subclass, wrapper of a transform, lazily negated or conjugated view,
// and on a device that has kernels here. Any other goes through the dispatcher, which knows what to do with it.
inline bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet special = c10::python_ks | c10::functorch_transforms_ks |
                                          c10::DispatchKeySet({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                                               c10::DispatchKey::ZeroTensor, c10::DispatchKey::Fake});
  if (!t.defined()) return true;
#if defined(UNLEARN_CUDA)
  const bool has_kernels = t.is_cpu() || t.is_cuda();
#else
  const bool has_kernels = t.is_cpu();
#endif
  return has_kernels && !t.key_set().has_any(special);
}
inline bool is_plain(const std::optional<at::Tensor>& t) { return !t || is_plain(*t); }
inline bool is_plain(const std::vector<at::Tensor>& list) {
  return std::all_of(list.begin(), list.end(), [](const at::Tensor& t) { return is_plain(t); });
}
template <class T>
bool is_plain(const T&) {
  return true;
}

template <class O, class R, class... P>
R call_dispatcher(P... arguments) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(("unlearn_ext::" + O::name()).c_str(), O::overload().c_str())
                                 .template typed<R(P...)>();
  return handle.call(arguments...);
}

template <class O, class R, class... P>
void define_direct(pybind11::module& m, R (*)(P...)) {
  auto call = [](typename Owned<P>::type... arguments) -> R {
    return (is_plain(arguments) && ...) ? O::function(arguments...) : call_dispatcher<O, R, P...>(arguments...);
  };
  [&]<size_t... I>(std::index_sequence<I...>) {
    m.def(O::name().c_str(), torch::wrap_pybind_function_no_gil(call), python_argument<I, O>()...);
  }(std::make_index_sequence<count_arguments(O::schema)>{});
}

template <class O>
struct BackendSelect {
  template <class R, class... P>
  static auto call(R (*)(P...)) {
    return +[](c10::DispatchKeySet keys, P... arguments) -> R {
      if (keys.highestBackendKey() == c10::BackendComponent::InvalidBit) return O::function(arguments...);
      static const auto handle = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow(("unlearn_ext::" + O::name()).c_str(), O::overload().c_str())
                                     .template typed<R(P...)>();
      const c10::DispatchKeySet below(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
      return handle.redispatch(keys & below, arguments...);
    };
  }
};

template <class... O>
struct OpList {
  static void define(torch::Library& m) { (m.def(O::schema.data(), {at::Tag::pt2_compliant_tag}), ...); }
  static void implement(torch::Library& m) { (m.impl(O::qualified_name().c_str(), O::function), ...); }
  static void define_direct(pybind11::module& m) { (unlearn_ext::define_direct<O>(m, O::function), ...); }
  static std::vector<std::string> schemas() { return {std::string(O::schema)...}; }

  // Calls whose lists are all empty reach no backend by themselves: they run here, the others go on to theirs.
  static void select_backend(torch::Library& m) {
    (m.impl(O::qualified_name().c_str(),
            torch::CppFunction::makeFromUnboxedFunction(BackendSelect<O>::call(O::function))),
     ...);
  }

  // Without this, autograd would warn on the next backward through every parameter that an op has written.
  // Differentiable ops get their formula in ops.py instead.
  static void without_autograd(torch::Library& m, std::initializer_list<std::string_view> differentiable) {
    const auto implement = [&](const std::string& name) {
      if (std::find(differentiable.begin(), differentiable.end(), name) == differentiable.end())
        m.impl(name.c_str(), torch::CppFunction::makeFallthrough());
    };
    (implement(O::qualified_name()), ...);
  }
};

template <class... L>
struct Join;
template <class... A>
struct Join<OpList<A...>> {
  using type = OpList<A...>;
};
template <class... A, class... B, class... Rest>
struct Join<OpList<A...>, OpList<B...>, Rest...> : Join<OpList<A..., B...>, Rest...> {};

// One list of the lists of every family.
template <class... L>
using Joined = typename Join<L...>::type;

}  // namespace unlearn_ext
