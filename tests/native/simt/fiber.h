// Fibers: their stacks, the switch between them, and what the sanitizers are told about it. Part of engine.h.
#pragma once

#if !defined(__x86_64__)
#error "the stack switch of the CUDA checker is written for x86-64"
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include <sys/mman.h>

#if defined(SIMT_TRAFFIC)  // ThreadSanitizer's instrumentation without ThreadSanitizer: traffic.h
#elif defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#elif __has_feature(thread_sanitizer)
#define SIMT_TSAN 1
#endif
#endif

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

// Saves the callee-saved registers on the current stack and resumes another one. An indirect jump instead of `ret`:
// the return predictor would miss on every switch.
extern "C" void simt_switch_stack(void** save_sp, void* load_sp);
__asm__(
    ".text\n.p2align 4\n.weak simt_switch_stack\n.hidden simt_switch_stack\n.type simt_switch_stack,@function\n"
    "simt_switch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\npopq %rcx\njmpq *%rcx\n"
    ".size simt_switch_stack,.-simt_switch_stack\n");

namespace simt {

struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { fwd, rev, rand };

struct Config {
  Order order = Order::fwd;
  uint64_t seed = 0;
  bool race_inter = false;  // TSan builds: look for races between blocks instead of inside one
  bool ends_only = false;   // run only the first and the last two blocks of every grid: huge tensors in sparse memory
  size_t stack_bytes = 64 << 10;

  static Config from_environment() {
    Config c;
    if (const char* s = std::getenv("SIMT_ORDER"))
      c.order = !std::strcmp(s, "rev") ? Order::rev : !std::strcmp(s, "rand") ? Order::rand : Order::fwd;
    if (const char* s = std::getenv("SIMT_SEED")) c.seed = std::strtoull(s, nullptr, 10);
    if (const char* s = std::getenv("SIMT_RACE")) c.race_inter = !std::strcmp(s, "inter");
#if defined(SIMT_ASAN)
    c.stack_bytes = 128 << 10;  // instrumented frames are larger
#elif defined(SIMT_TSAN)
    c.stack_bytes = 32 << 10;  // every block's stacks are cleared, and four times as much for ThreadSanitizer's notes
#endif
    return c;
  }
};
inline Config& config() {
  static Config c = Config::from_environment();
  return c;
}

// ---- ThreadSanitizer: what it may see, and what orders what

struct Quiet {  // bookkeeping of the engine must stay invisible to it
#ifdef SIMT_TSAN
  Quiet() { enter(); }
  ~Quiet() { leave(); }
  static void enter() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  static void leave() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  Quiet() {}
#endif
};

inline void happens_before([[maybe_unused]] void* sync) {
#ifdef SIMT_TSAN
  __tsan_release(sync);
#endif
}
inline void happens_after([[maybe_unused]] void* sync) {
#ifdef SIMT_TSAN
  __tsan_acquire(sync);
#endif
}

#ifdef SIMT_TSAN
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif
#ifdef SIMT_ASAN
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = kTsan;
#endif

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  size_t bytes = 0;
  void *asan_fake = nullptr, *tsan = nullptr;
  bool used = false;
};

[[noreturn]] void fiber_entry();

inline void arm(Fiber* f) {  // the next switch to it starts at fiber_entry
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(f->stack, f->bytes);
#endif
#ifdef SIMT_TSAN
  if (!config().race_inter) {
    if (f->tsan) __tsan_destroy_fiber(f->tsan);
    f->tsan = __tsan_create_fiber(0);
  }
#endif
  // Staggered stack tops: the hot frames of different fibers would otherwise share cache sets.
  const size_t skew = (reinterpret_cast<uintptr_t>(f->stack) / f->bytes) % 61 * 64;
  auto** sp = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f->stack) + f->bytes - skew) & ~uintptr_t{15});
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&fiber_entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f->sp = sp;
}

inline void map_stack(Fiber* f) {
  f->bytes = config().stack_bytes;
  f->stack = static_cast<char*>(
      mmap(nullptr, f->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (f->stack == MAP_FAILED) throw error("simt: cannot map a fiber stack");
  mprotect(f->stack, 4096, PROT_NONE);  // overflow guard
}

}  // namespace simt
