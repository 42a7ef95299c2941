// Executes the blocks of a CUDA grid on the CPU, one fiber per CUDA thread. Included by simt_cpu.h only.
//
// Blocks run one after another. A fiber runs until it reaches a collective (barrier, shuffle, vote, mma), so kernels
// without collectives never switch stacks. What it adds to plain execution:
//   - schedules: SIMT_ORDER=fwd|rev|rand and SIMT_SEED change the order of threads, releases and blocks
//   - shared memory is refilled with 0xFF (NaN, -1) for every block and fenced with canaries
//   - divergent barriers, threads that return before a barrier, bad masks and deadlocks throw simt::error
//   - AddressSanitizer: fiber annotations, red zones around every shared array
//   - ThreadSanitizer: every CUDA thread (SIMT_RACE=intra) or every block (SIMT_RACE=inter) is a TSan fiber, and only
//     barriers, __syncwarp() and fences with atomics order them: a missing one is a data race with file and line
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "traffic.h"

#ifdef SIMT_TRAFFIC
constexpr bool kSimtTraffic = true;
#else
constexpr bool kSimtTraffic = false;
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Out of line, so that code reached from every call site of a collective exists once.
#define SIMT_RUNTIME inline __attribute__((noinline))

namespace simt {

struct Stats {
  uint64_t launches = 0, blocks = 0, threads = 0, switches = 0, barriers = 0, warp_ops = 0;
  uint64_t half_mmas = 0;  // a whole one is two of half its depth
};
inline Stats& stats() {
  static Stats s;
  return s;
}

// ---- State

struct Thread;

struct Rendezvous {  // one warp collective in progress: lanes deposit a pointer, the last one runs op for all
  uint32_t mask = 0, arrived = 0;
  void (*op)(Rendezvous&) = nullptr;
  const char *what = nullptr, *file = nullptr;
  int line = 0;
  char* sync = nullptr;  // address that stands for it towards TSan, if it orders memory
  void* arg[32];
  Thread* who[32];
};

struct Warp {
  uint32_t alive = 0;
  char* sync = nullptr;  // addresses for its collectives, used in turn
  unsigned turn = 0;
  Rendezvous collectives[16];
};

struct AsyncCopy {
  void* to;
  const void* from;  // null for zeros
  size_t bytes;
  int group;
};

struct Thread {
  uint3 tid{};
  unsigned linear = 0, lane = 0;
  Warp* warp = nullptr;
  Fiber* fiber = nullptr;
  bool done = false;
  const char* wait_file = nullptr;
  int wait_line = 0, copy_group = 0;
  std::vector<AsyncCopy> copies;
  bool fenced = false, fence_used = false;  // the model of __threadfence(), see order_atomic
  std::vector<void*> atomics_seen;
};

struct SharedArray {
  const void* key;
  unsigned char* p;
  size_t bytes;
};

constexpr size_t kZone = 128;  // canary or red zone on both sides of a shared array
constexpr unsigned char kCanary = 0xEE, kPoison = 0xFF;
constexpr unsigned kMaxThreads = 1024;

struct Machine {  // the block being executed
  dim3 grid, block;
  uint3 bid{};
  unsigned n_threads = 0, live = 0, next = 0;
  std::vector<Thread> threads{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / 32};
  std::vector<unsigned> order;  // in which threads start
  std::vector<Fiber*> fibers, idle;
  Fiber* running = nullptr;
  Fiber main;
  void* block_context = nullptr;  // TSan between blocks: the context that stands for the whole block
  Thread* ready[kMaxThreads];     // ring buffer
  unsigned ready_head = 0, n_ready = 0;
  std::vector<Thread*> at_barrier;
  int votes = 0, votes_of_last = 0;  // __syncthreads_count, _and, _or
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  char* barrier_sync = nullptr;  // addresses of even and odd barriers
  unsigned turn = 0;
  void (*body)(void*) = nullptr;
  void* body_arg = nullptr;
  std::vector<SharedArray> shared;
  size_t dynamic_bytes = 0;
  std::string failure;
  std::mt19937_64 rng;
  uint64_t serial = 0;  // blocks executed so far

  ~Machine();
};
inline Machine machine;
inline Thread* cur = nullptr;

// Addresses that stand for launch start and end, and for the barriers of a block, towards TSan. Two barriers in a row
// need two: a thread may arrive at the second one before another has left the first, which that must not be ordered by.
constexpr unsigned kWarpSyncs = 8, kBlockSyncs = 2 + kMaxThreads / 32 * kWarpSyncs;
inline char g_start_sync[8], g_end_sync[8], g_block_sync[1024 * kBlockSyncs * 8];

// ---- Scheduler

inline Fiber* new_fiber() {
  machine.fibers.push_back(new Fiber);
  map_stack(machine.fibers.back());
  arm(machine.fibers.back());
  return machine.fibers.back();
}

inline void hop(Fiber* from, Fiber* to) {
  ++stats().switches;
  machine.running = to;
  to->used = true;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&from->asan_fake, to->stack, to->bytes);
#endif
#ifdef SIMT_TSAN
  void* context = to == &machine.main || !config().race_inter ? to->tsan : machine.block_context;
  Quiet::leave();
  __tsan_switch_to_fiber(context, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch_stack(&from->sp, to->sp);
#ifdef SIMT_TSAN
  Quiet::enter();
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from->asan_fake, nullptr, nullptr);
#endif
}

inline std::string at(const char* file, int line) {
  return std::string(file ? file : "?") + ":" + std::to_string(line);
}
inline std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

[[noreturn]] SIMT_RUNTIME void fail(const std::string& message) {  // abandons every fiber; run_block throws
  machine.failure = "simt: block " + triple(machine.bid) + (cur ? " thread " + triple(cur->tid) : "") + ": " + message;
  cur = nullptr;
  hop(machine.running, &machine.main);
  std::abort();
}

inline void push_ready(Thread* t) { machine.ready[(machine.ready_head + machine.n_ready++) % kMaxThreads] = t; }

// The current fiber waits or has ended: run a ready thread, else start a new one, else return to the launcher.
inline void schedule() {
  Machine& m = machine;
  Fiber *self = m.running, *to;
  if (m.n_ready) {
    cur = m.ready[m.ready_head];
    m.ready_head = (m.ready_head + 1) % kMaxThreads;
    --m.n_ready;
    to = cur->fiber;
  } else if (m.next < m.n_threads) {
    cur = nullptr;
    if (kTsan && !config().race_inter) {  // one TSan context per CUDA thread of the block
      to = m.fibers[m.order[m.next]];
    } else {
      if (m.idle.empty()) m.idle.push_back(new_fiber());
      to = m.idle.back();
      m.idle.pop_back();
    }
  } else if (m.live == 0) {
    cur = nullptr;
    to = &m.main;
  } else {
    std::string message = "deadlock, " + std::to_string(m.live) + " threads wait:";
    for (unsigned i = 0, shown = 0; i < m.n_threads && shown < 6; ++i)
      if (const Thread& t = m.threads[i]; !t.done)
        message += " " + triple(t.tid) + "@" + at(t.wait_file, t.wait_line), ++shown;
    cur = nullptr;
    fail(message);
  }
  if (to != self) hop(self, to);
}

inline void wait_here(const char* file, int line) {
  cur->wait_file = file;
  cur->wait_line = line;
  schedule();
}

// In rand order threads may also lose the processor at an atomic.
inline void preempt() {
  if (config().order != Order::rand) return;
  Quiet q;
  if ((machine.rng() & 7) != 0 || (machine.n_ready == 0 && machine.next >= machine.n_threads)) return;
  push_ready(cur);
  schedule();
}

// TSan only. CUDA atomics are relaxed: they order other accesses only together with a __threadfence() before (release)
// and after (acquire) them. A fence covers the thread's atomics up to the barrier after the first one.
inline void order_atomic([[maybe_unused]] void* p) {
  preempt();
#ifdef SIMT_TSAN
  bool fenced;
  {
    Quiet q;
    if ((fenced = cur->fenced)) cur->fence_used = true;
    auto& seen = cur->atomics_seen;  // the most recent 64 addresses
    if (const auto it = std::find(seen.begin(), seen.end(), p); it != seen.end()) seen.erase(it);
    if (seen.size() == 64) seen.erase(seen.begin());
    seen.push_back(p);
  }
  if (fenced) __tsan_release(p);
#endif
}

inline void fence() {
#ifdef SIMT_TSAN
  void* seen[64];
  size_t n;
  {
    Quiet q;
    n = cur->atomics_seen.size();
    std::copy(cur->atomics_seen.begin(), cur->atomics_seen.end(), seen);
    cur->atomics_seen.clear();
    cur->fenced = true, cur->fence_used = false;
  }
  for (size_t i = 0; i < n; ++i) __tsan_acquire(seen[i]);
#endif
}

// ---- Barriers and warp collectives

inline void release_barrier_if_complete() {
  Machine& m = machine;
  if (m.at_barrier.empty() || m.at_barrier.size() != m.live) return;
  if (m.live != m.n_threads)
    fail(std::to_string(m.n_threads - m.live) + " of " + std::to_string(m.n_threads) +
         " threads returned before the barrier at " + at(m.barrier_file, m.barrier_line));
  if (config().order == Order::rand) std::shuffle(m.at_barrier.begin(), m.at_barrier.end(), m.rng);
  for (Thread* t : m.at_barrier) push_ready(t);
  m.at_barrier.clear();
  if constexpr (kSimtTraffic) traffic::end_of_block();
  m.votes_of_last = m.votes;
  m.votes = 0;
  ++m.turn;
  ++stats().barriers;
}

SIMT_RUNTIME int barrier(int predicate, const char* file, int line) {  // the number of threads whose predicate holds
  Machine& m = machine;
  char* const sync = m.barrier_sync + m.turn % 2 * 8;
  happens_before(sync);
  int votes;
  {
    Quiet q;
    if (!m.at_barrier.empty() && (m.barrier_line != line || std::strcmp(m.barrier_file, file) != 0))
      fail("divergent barrier: arrives at " + at(file, line) + " while thread " + triple(m.at_barrier[0]->tid) +
           " waits at " + at(m.barrier_file, m.barrier_line));
    m.barrier_file = file;
    m.barrier_line = line;
    m.votes += predicate != 0;
    if (cur->fence_used) cur->fenced = cur->fence_used = false;
    m.at_barrier.push_back(cur);
    release_barrier_if_complete();
    wait_here(file, line);
    votes = m.votes_of_last;
  }
  happens_after(sync);
  return votes;
}

inline void finish_if_complete(Rendezvous& r, const Warp& warp) {
  if (!r.arrived || r.arrived != (r.mask & warp.alive)) return;
  r.op(r);
  ++stats().warp_ops;
  if constexpr (kSimtTraffic)
    if (r.arrived == warp.alive) traffic::warp_synchronised(r.who[__builtin_ctz(r.arrived)]->linear / 32);
  Thread* lanes[32];
  int n = 0;
  for (uint32_t m = r.arrived; m; m &= m - 1) lanes[n++] = r.who[__builtin_ctz(m)];
  r.arrived = 0;
  if (config().order == Order::rand) std::shuffle(lanes, lanes + n, machine.rng);
  for (int i = 0; i < n; ++i) push_ready(lanes[i]);
}

SIMT_RUNTIME void collective(uint32_t mask, void* arg, void (*op)(Rendezvous&), const char* what, const char* file,
                             int line, bool orders_memory = false) {
  Quiet q;
  Thread* t = cur;
  Warp& warp = *t->warp;
  if (!(mask >> t->lane & 1)) fail(std::string(what) + ": calling lane is not in the mask, at " + at(file, line));
  Rendezvous *r = nullptr, *spare = nullptr;
  for (Rendezvous& c : warp.collectives) {
    if (c.arrived && c.mask == mask) {
      r = &c;
      break;
    }
    if (!c.arrived && !spare) spare = &c;
  }
  if (!r) {
    if (!spare) fail("too many different masks in one warp");
    r = spare;
    r->mask = mask, r->op = op, r->what = what, r->file = file, r->line = line;
    r->sync = warp.sync + warp.turn++ % kWarpSyncs * 8;
  } else if (r->op != op) {
    fail(std::string("warp divergence: ") + what + " at " + at(file, line) + " meets " + r->what + " at " +
         at(r->file, r->line));
  }
  r->arg[t->lane] = arg;
  r->who[t->lane] = t;
  r->arrived |= 1u << t->lane;
  char* const sync = r->sync;
  if (orders_memory) happens_before(sync);
  finish_if_complete(*r, warp);
  wait_here(file, line);
  if (orders_memory) happens_after(sync);
}

SIMT_RUNTIME void thread_exit(Thread* t) {
  if (!t->copies.empty()) fail("thread returned with cp.async copies in flight");
  t->done = true;
  --machine.live;
  t->warp->alive &= ~(1u << t->lane);
  for (Rendezvous& r : t->warp->collectives)
    if (r.arrived) finish_if_complete(r, *t->warp);
  if (machine.live) release_barrier_if_complete();
}

[[noreturn]] SIMT_RUNTIME void fiber_entry() {
#ifdef SIMT_ASAN
  {
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!machine.main.stack)
      machine.main.stack = static_cast<char*>(const_cast<void*>(bottom)), machine.main.bytes = bytes;
  }
#endif
  for (;;) {
    {
      Quiet q;
      Thread* t = &machine.threads[machine.order[machine.next++]];
      t->fiber = machine.running;
      cur = t;
    }
    happens_after(g_start_sync);
    machine.body(machine.body_arg);
    happens_before(g_end_sync);
    {
      Quiet q;
      thread_exit(cur);
      machine.idle.push_back(machine.running);
      schedule();
    }
  }
}

// ---- Shared memory

// One array per declaration (`key`) and block; asked for once per thread.
SIMT_RUNTIME void* shared_alloc(const void* key, size_t bytes) {
  for (SharedArray& a : machine.shared)
    if (a.key == key && a.bytes == bytes) return a.p;
  Quiet q;
  const size_t body = (bytes + 7) / 8 * 8;
  auto* raw = static_cast<unsigned char*>(std::aligned_alloc(kZone, (body + 3 * kZone - 1) / kZone * kZone));
  std::memset(raw, kCanary, body + 2 * kZone);
  std::memset(raw + kZone, kPoison, bytes);
#ifdef SIMT_ASAN
  __asan_poison_memory_region(raw, kZone);
  __asan_poison_memory_region(raw + kZone + bytes, body - bytes + kZone);
#endif
  machine.shared.push_back({key, raw + kZone, bytes});
  if constexpr (kSimtTraffic) traffic::shared_array(raw + kZone, bytes);
  return raw + kZone;
}
inline void* shared_dynamic() { return shared_alloc(&g_start_sync, machine.dynamic_bytes); }

inline void release_shared(const SharedArray& a) {
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(a.p - kZone, a.bytes + 2 * kZone);
#endif
  std::free(a.p - kZone);
}

inline void reset_shared() {  // after each block: check the canaries, poison again
  for (SharedArray& a : machine.shared) {
#ifndef SIMT_ASAN  // which reports the write itself
    const auto intact = [](const unsigned char* p) { return std::count(p, p + kZone, kCanary) == kZone; };
    if (!intact(a.p - kZone) || !intact(a.p + a.bytes)) {
      std::memset(a.p - kZone, kCanary, kZone), std::memset(a.p + a.bytes, kCanary, kZone);
      machine.failure = "simt: block " + triple(machine.bid) + ": write outside a shared array of " +
                        std::to_string(a.bytes) + " bytes";
    }
#endif
    if (kTsan)
      release_shared(a);  // fresh memory per block: its shadow forgets the previous one
    else
      std::memset(a.p, kPoison, a.bytes);
  }
  if (kTsan) machine.shared.clear();
}

inline Machine::~Machine() {
  for (Fiber* f : fibers) munmap(f->stack, f->bytes), delete f;
  for (const SharedArray& a : shared) release_shared(a);
}

// ---- Grids

inline void begin_block(uint64_t index) {
  Machine& m = machine;
  m.bid = {static_cast<unsigned>(index % m.grid.x), static_cast<unsigned>(index / m.grid.x % m.grid.y),
           static_cast<unsigned>(index / m.grid.x / m.grid.y)};
  char* pool = g_block_sync + m.serial++ % 1024 * kBlockSyncs * 8;
  m.barrier_sync = pool;
  m.live = m.n_threads;
  m.next = m.ready_head = m.n_ready = 0;
  for (unsigned i = 0; i < m.n_threads; ++i) {
    Thread& t = m.threads[i];
    t.tid = {i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y};
    t.linear = i, t.lane = i % 32, t.warp = &m.warps[i / 32];
    t.done = false, t.fiber = nullptr, t.copy_group = 0;
    t.copies.clear(), t.atomics_seen.clear();
    t.fenced = t.fence_used = false;
  }
  for (unsigned i = 0; i * 32 < m.n_threads; ++i) {
    const unsigned lanes = std::min(32u, m.n_threads - i * 32);
    m.warps[i].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
    m.warps[i].sync = pool + (2 + i * kWarpSyncs) * 8;
    for (Rendezvous& r : m.warps[i].collectives) r.arrived = 0;
  }
  m.order.resize(m.n_threads);
  for (unsigned i = 0; i < m.n_threads; ++i) m.order[i] = config().order == Order::rev ? m.n_threads - 1 - i : i;
  if (config().order == Order::rand) std::shuffle(m.order.begin(), m.order.end(), m.rng);
}

SIMT_RUNTIME void run_block(uint64_t index) {
  Quiet q;
  Machine& m = machine;
  begin_block(index);
#ifdef SIMT_TSAN
  m.main.tsan = __tsan_get_current_fiber();
  if (config().race_inter)
    m.block_context = __tsan_create_fiber(0);
  else
    while (m.fibers.size() < m.n_threads) new_fiber();
#endif
  m.running = &m.main;
  schedule();
  if constexpr (kSimtTraffic) traffic::end_of_block();
#ifdef SIMT_TSAN
  if (config().race_inter) {  // a fresh context per block: the stacks must forget the old one
    __tsan_destroy_fiber(m.block_context);
    for (Fiber* f : m.fibers)
      if (f->used) munmap(f->stack, f->bytes), map_stack(f), arm(f), f->used = false;
  }
#endif
  ++stats().blocks;
  stats().threads += m.n_threads;
  if (m.failure.empty()) reset_shared();
  if (m.failure.empty()) return;
  std::string message;
  message.swap(m.failure);
  m.at_barrier.clear();
  m.votes = 0;
  m.idle = m.fibers;
  for (Fiber* f : m.fibers) arm(f);
  for (Thread& t : m.threads) t.copies.clear();
  reset_shared();
  m.failure.clear();
  throw error(message);
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* arg) {
  Machine& m = machine;
  const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(config().order == Order::rand && !config().ends_only ? n_blocks : 0);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  m.rng.seed(config().seed);
  std::shuffle(order.begin(), order.end(), m.rng);
  m.grid = grid, m.block = block, m.n_threads = block.x * block.y * block.z;
  m.dynamic_bytes = shared_bytes, m.body = body, m.body_arg = arg;
  ++stats().launches;
  happens_before(g_start_sync);
  for (uint64_t i = 0; i < n_blocks; ++i) {
    if (config().ends_only && i >= 2 && i + 2 < n_blocks) continue;
    run_block(config().ends_only || config().order == Order::fwd ? i
              : config().order == Order::rev                     ? n_blocks - 1 - i
                                                                 : order[i]);
  }
  happens_after(g_end_sync);
  if constexpr (kSimtTraffic) traffic::end_of_launch();
}

}  // namespace simt
