// A small test framework for kernels without torch: buffers in host and device memory, checks, and cases that run on
// every backend the program was linked with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/lists.h"

#if defined(UNLEARN_TEST_GPU)
#include <cuda_runtime_api.h>
#elif defined(UNLEARN_EMULATE)
#include "core/simt.h"
#else
#include "core/capability.h"
#endif

namespace unlearn_ext::test {

// ---- Checks. A failure prints where it is and in which scopes; the program goes on and exits with 1 at the end.

void passed();
void failed(const std::string& what, std::source_location where);

// The text is put together only where it is needed: there are millions of checks.
#define CHECK(condition, text) \
  ((condition) ? ::unlearn_ext::test::passed() : ::unlearn_ext::test::failed(text, std::source_location::current()))

// Text printed with every failure while it lives.
struct Scope {
  explicit Scope(std::string text);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

struct Case {
  Case(const char* name, std::function<void()> run);  // registers itself
};

// UNLEARN_REDUCED=1 in the environment asks for part of the sizes, 2 for half of those: ThreadSanitizer runs ten times
// slower and more.
inline size_t reduced() {
  static const char* const asked = std::getenv("UNLEARN_REDUCED");
  return asked == nullptr ? 0 : std::strtoul(asked, nullptr, 10);
}
// All items; if reduced, the last one and every `step`-th before it, or every second of these.
template <class T>
std::vector<T> thinned(std::vector<T> items, size_t step) {
  if (!reduced()) return items;
  std::vector<T> some;
  for (size_t i = 0; i < items.size(); ++i)
    if ((items.size() - 1 - i) % (step * reduced()) == 0) some.push_back(items[i]);
  return some;
}

// ---- Numbers

inline std::mt19937_64& rng() {
  static std::mt19937_64 engine;
  return engine;
}
inline uint64_t below(uint64_t n) { return rng()() % n; }
inline double uniform(double low, double high) {
  return low + (high - low) * static_cast<double>(rng()() >> 11) * 0x1p-53;
}

// Wide enough for the product of two doubles.
#if defined(__SIZEOF_FLOAT128__)
using Quad = __float128;
#else
using Quad = long double;
static_assert(std::numeric_limits<Quad>::digits >= 106);
#endif

template <class T>
struct Format;  // significand bits stored, and the exponent of the least normal
template <>
struct Format<double> {
  static constexpr const char* name = "f64";
  static constexpr DType dtype = DType::f64;
  static constexpr int fraction = 52, least = -1022;
};
template <>
struct Format<float> {
  static constexpr const char* name = "f32";
  static constexpr DType dtype = DType::f32;
  static constexpr int fraction = 23, least = -126;
};
template <>
struct Format<Half> {
  static constexpr const char* name = "f16";
  static constexpr DType dtype = DType::f16;
  static constexpr int fraction = 10, least = -14;
};
template <>
struct Format<BFloat16> {
  static constexpr const char* name = "bf16";
  static constexpr DType dtype = DType::bf16;
  static constexpr int fraction = 7, least = -126;
};

// Distance between neighbouring values of T around x.
template <class T>
double spacing(double x) {
  const int exponent = x == 0 ? Format<T>::least : std::max(std::ilogb(x), Format<T>::least);
  return std::ldexp(1.0, exponent - Format<T>::fraction);
}

// The value of T nearest to x, ties to even: worked out from the format, not with the code under test.
template <class T>
T nearest(double x) {
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, float>) {
    return static_cast<T>(x);
  } else {
    constexpr int kBits = Format<T>::fraction;
    constexpr uint16_t kInf = static_cast<uint16_t>(0x7fff >> kBits << kBits);
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return {static_cast<uint16_t>(kInf | 1u << (kBits - 1))};
    if (std::isinf(x)) return {static_cast<uint16_t>(sign | kInf)};
    const double step = spacing<T>(x);
    // Steps since zero: one binade of subnormals, then 2^kBits steps per binade.
    const int binades = std::ilogb(step) - (Format<T>::least - kBits);
    const double steps = std::nearbyint(std::fabs(x) / step) + binades * std::ldexp(1.0, kBits);
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::min(steps, static_cast<double>(kInf))))};
  }
}

template <class T>
double value(T x) {
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, float>) {
    return static_cast<double>(x);
  } else {
    constexpr int kBits = Format<T>::fraction;
    const int exponent = (x.bits & 0x7fff) >> kBits, fraction = x.bits & ((1 << kBits) - 1);
    const double sign = x.bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 0x7fff >> kBits) return fraction ? std::nan("") : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, Format<T>::least - kBits);
    return sign * std::ldexp(fraction + (1 << kBits), exponent - 1 + Format<T>::least - kBits);
  }
}

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Any bit pattern, NaN payloads and subnormals included.
template <class T>
T any_bits() {
  T x;
  const uint64_t bits = rng()();
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// ---- Memory

#if defined(UNLEARN_TEST_GPU)
inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(3);
}
#endif

// n elements that start `offset` elements after an aligned address. The elements before it, and a few behind the end,
// must keep their bits; AddressSanitizer watches the end itself, so it gets none there.
template <class T>
class Buf {
 public:
  explicit Buf(int64_t n, int64_t offset = 0)
      : n_(n), offset_(offset), all_(static_cast<size_t>(offset + n + kGuard)), memory_(bytes()) {
    if (!all_.empty()) std::memset(static_cast<void*>(all_.data()), 0x5a, bytes());
  }

  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return all_[static_cast<size_t>(offset_ + i)]; }
  const T& operator[](int64_t i) const { return all_[static_cast<size_t>(offset_ + i)]; }

  // The address kernels get, after the contents have been sent there.
  T* device() {
    memory_.send(all_.data(), bytes());
    sent_ = true;
    return static_cast<T*>(memory_.address) + offset_;
  }
  // Fetches what was sent back; false if a kernel wrote outside.
  bool fetch() {
    if (!sent_) return true;
    memory_.receive(all_.data(), bytes());
    for (size_t i = 0; i < all_.size(); ++i)
      if (i < static_cast<size_t>(offset_) || i >= static_cast<size_t>(offset_ + n_))
        for (size_t b = 0; b < sizeof(T); ++b)
          if (reinterpret_cast<const unsigned char*>(&all_[i])[b] != 0x5a) return false;
    return true;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 64;
#endif
  size_t bytes() const { return all_.size() * sizeof(T); }

  // Where kernels work: a block of exactly this size, on the heap or on the device.
  struct Memory {
    void* address = nullptr;
#if defined(UNLEARN_TEST_GPU)
    explicit Memory(size_t bytes) { must(cudaMalloc(&address, bytes ? bytes : 1)); }
    ~Memory() { cudaFree(address); }
    void send(const void* from, size_t bytes) { must(cudaMemcpy(address, from, bytes, cudaMemcpyHostToDevice)); }
    void receive(void* to, size_t bytes) { must(cudaMemcpy(to, address, bytes, cudaMemcpyDeviceToHost)); }
#else
    explicit Memory(size_t bytes) : address(std::malloc(bytes)) {}
    ~Memory() { std::free(address); }
    void send(const void* from, size_t bytes) {
      if (bytes) std::memcpy(address, from, bytes);
    }
    void receive(void* to, size_t bytes) {
      if (bytes) std::memcpy(to, address, bytes);
    }
#endif
    Memory(Memory&& other) noexcept : address(std::exchange(other.address, nullptr)) {}
  };

  int64_t n_, offset_;
  bool sent_ = false;
  std::vector<T> all_;
  Memory memory_;
};

// One list of tensors, every one `offset` elements after an aligned address.
template <class T>
struct List {
  std::vector<Buf<T>> now, before;  // what kernels work on, and what it was filled with

  template <class Fill>
  List(const std::vector<int64_t>& sizes, int64_t offset, const Fill& fill) {
    for (const int64_t n : sizes) {
      now.emplace_back(n, offset);
      before.emplace_back(n);
      for (int64_t i = 0; i < n; ++i) before.back()[i] = now.back()[i] = fill();
    }
  }

  void fetch() {
    for (size_t t = 0; t < now.size(); ++t) CHECK(now[t].fetch(), "a write outside tensor " + std::to_string(t));
  }
  // After fetch(): for lists that must only be read.
  void check_unchanged(const char* name, std::source_location where = std::source_location::current()) const {
    for (size_t t = 0; t < now.size(); ++t)
      for (int64_t i = 0; i < now[t].size(); ++i)
        if (!same_bits(now[t][i], before[t][i]))
          return failed(std::string(name) + " changed at " + std::to_string(t) + ", " + std::to_string(i), where);
  }
};

template <class First, class... Rest>
std::vector<Slice<1 + sizeof...(Rest)>> slices_of(List<First>& first, List<Rest>&... rest) {
  std::vector<Slice<1 + sizeof...(Rest)>> slices;
  for (size_t t = 0; t < first.now.size(); ++t)
    slices.push_back({{first.now[t].device(), rest.now[t].device()...}, first.now[t].size()});
  return slices;
}

// ---- Backends

#if defined(UNLEARN_TEST_GPU) || defined(UNLEARN_EMULATE)
inline constexpr bool kOnCuda = true;

template <class F>
void on_backends(const F& f) {
  f.template operator()<Backend::cuda>(Exec{});
}
#else
inline constexpr bool kOnCuda = false;

using Body = void (*)(const void* context, int64_t begin, int64_t end);

inline void whole(int64_t n, int64_t, Body body, const void* context) {
  if (n > 0) body(context, 0, n);
}
// As many ranges as the contract allows, last first: results must not depend on how work is shared out.
inline void in_pieces(int64_t n, int64_t grain, Body body, const void* context) {
  const int64_t pieces = std::max<int64_t>(n > 0, n / grain);
  for (int64_t p = pieces - 1; p >= 0; --p) body(context, n * p / pieces, n * (p + 1) / pieces);
}

// f.operator()<B>(exec) if `capability`, B or B with more than its instructions, is compiled in and runs here.
template <Backend B, class F>
void on_cpu(const F& f, Backend capability = B) {
  const auto& compiled = compiled_cpu_backends();
  const auto at = [&](Backend b) { return std::find(compiled.begin(), compiled.end(), b); };
  if (at(capability) == compiled.end() || at(capability) < at(cpu_backend())) return;
  for (const auto parallel_for : {&whole, &in_pieces}) {
    const bool in_one = parallel_for == &whole;
    const Scope scope(std::string(name_of(capability)) + (in_one ? ", one range" : ", many ranges"));
    Exec exec{nullptr, parallel_for};
    exec.threads = in_one ? 1 : 64;
    exec.bf16_dots = capability == Backend::cpu_avx512_bf16;
    exec.matrix_unit = capability == Backend::cpu_amx;
    f.template operator()<B>(exec);
  }
}

// f.operator()<B>(exec) for every backend that runs here; on a CPU, for two ways to share out the work.
template <class F>
void on_backends(const F& f) {
  on_cpu<Backend::cpu_baseline>(f);
#if defined(__x86_64__)
  on_cpu<Backend::cpu_avx2>(f);
  on_cpu<Backend::cpu_avx512>(f);
  on_cpu<Backend::cpu_avx512>(f, Backend::cpu_avx512_bf16);
  on_cpu<Backend::cpu_avx512>(f, Backend::cpu_amx);
#endif
}
#endif

template <class F>
void on_dtypes(const F& f) {
  const auto one = [&]<class T>(Tag<T> tag) {
    const Scope scope(Format<T>::name);
    f(tag);
  };
  one(Tag<float>{}), one(Tag<BFloat16>{});
  if (!reduced()) one(Tag<double>{}), one(Tag<Half>{});
}

}  // namespace unlearn_ext::test
