#include <algorithm>
#include <bit>
#include <unordered_map>

#include <sys/mman.h>

#include "engine.h"
#include "traffic.h"

namespace simt::traffic {
namespace {

constexpr uint64_t kSpace = uint64_t{1} << 32, kPage = 4096;

struct Range {
  std::string name;
  uint64_t begin, end;                  // in the space
  std::vector<uint64_t> read, written;  // a bit per sector, of this launch
};

struct Place {
  uint64_t address = 0;
  uint32_t bytes = 0;
};

// Accesses of one warp at one place of the code, 32 lanes per round.
struct Site {
  Access access = Access::load;
  uint32_t rounds[32] = {};
  std::vector<Place> places;
};

struct State {
  char* space;
  uint64_t used = 0;
  std::vector<uint16_t> range_of_page = std::vector<uint16_t>(kSpace / kPage, 0);
  std::vector<Range> ranges{1};
  std::map<std::string, OfArray> arrays;
  Shared shared;
  std::unordered_map<uint64_t, uint32_t> sites;  // by code address and piece
  std::vector<Site> of_warp[kMaxThreads / 32];
  std::vector<uint32_t> busy[kMaxThreads / 32];
  // Not the engine's vector of them: the instrumentation sees that vector change, too.
  uint64_t shared_begin[256], shared_bytes[256], first_shared = ~uint64_t{0}, last_shared = 0;
  int n_shared = 0;
  int uncounted = 0;

  State()
      : space(static_cast<char*>(
            mmap(nullptr, kSpace, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (space == MAP_FAILED) throw error("simt: cannot map memory for the arrays");
  }
};
State& state() {
  static State s;
  return s;
}

bool is_shared(uint64_t address) {
  const State& s = state();
  if (address < s.first_shared || address >= s.last_shared) return false;
  for (int i = 0; i < s.n_shared; ++i)
    if (address - s.shared_begin[i] < s.shared_bytes[i]) return true;
  return false;
}

void add_bits(std::vector<uint64_t>& bits, uint64_t sector) { bits[sector / 64] |= uint64_t{1} << sector % 64; }

// One warp instruction on arrays: which sectors, and how many bytes of each.
void count_global(const Place* lanes, Access access) {
  State& s = state();
  struct Part {
    uint64_t sector;
    uint32_t bytes;  // a bit each
  };
  Part parts[64];
  int n = 0;
  uint64_t asked = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const Place& p = lanes[lane];
    asked += p.bytes;
    for (uint64_t at = p.address, end = p.address + p.bytes; at < end;) {
      const uint64_t sector = at / kSector, upto = std::min(end, (sector + 1) * kSector);
      const auto mask = static_cast<uint32_t>(((uint64_t{1} << (upto - at)) - 1) << at % kSector);
      if (n && parts[n - 1].sector == sector)
        parts[n - 1].bytes |= mask;
      else
        parts[n++] = {sector, mask};
      at = upto;
    }
  }
  std::sort(parts, parts + n, [](const Part& a, const Part& b) { return a.sector < b.sector; });
  int ranges_seen = -1;
  for (int i = 0; i < n;) {
    const uint64_t sector = parts[i].sector;
    uint32_t bytes = 0;
    for (; i < n && parts[i].sector == sector; ++i) bytes |= parts[i].bytes;
    const int range = s.range_of_page[sector * kSector / kPage];
    Range& r = s.ranges[static_cast<size_t>(range)];
    const auto add = [&](Count& c, std::vector<uint64_t>& bits) {
      if (range != ranges_seen) ++c.instructions, c.asked += asked;
      c.useful += static_cast<unsigned>(std::popcount(bytes));
      ++c.sectors;
      add_bits(bits, sector - r.begin / kSector);
    };
    OfArray& array = s.arrays[r.name];
    if (access != Access::store) add(array.loads, r.read);
    if (access != Access::load) add(array.stores, r.written);
    ranges_seen = range;
  }
}

// One warp instruction on shared memory. 8 and 16 bytes per lane go in halves and quarters of the warp; lanes that read
// one word share it, atomics on one word wait for each other.
void count_shared(const Place* lanes, Access access) {
  uint32_t width = 4;
  for (int lane = 0; lane < 32; ++lane) width = std::max(width, lanes[lane].bytes);
  const int together = static_cast<int>(128 / std::bit_ceil(width));
  for (int first = 0; first < 32; first += together) {
    uint64_t words[kBanks][32];
    int n[kBanks] = {}, most = 0;
    for (int lane = first; lane < first + together; ++lane)
      for (uint64_t at = lanes[lane].address / 4; at * 4 < lanes[lane].address + lanes[lane].bytes; ++at) {
        const auto bank = at % kBanks;
        if (access != Access::atomic && std::find(words[bank], words[bank] + n[bank], at) != words[bank] + n[bank])
          continue;
        words[bank][n[bank]++] = at;
        most = std::max(most, n[bank]);
      }
    state().shared.wavefronts += static_cast<unsigned>(most);
    state().shared.least += most != 0;
  }
}

void record(uint64_t site, bool in_array, uint64_t address, uint32_t bytes, Access access) {
  State& s = state();
  const auto id =
      s.sites.try_emplace(site * 4 + (in_array ? 2 : 0), static_cast<uint32_t>(s.sites.size())).first->second;
  const unsigned warp = cur->linear / 32, lane = cur->lane;
  auto& sites = s.of_warp[warp];
  if (sites.size() <= id) sites.resize(id + 1);
  Site& here = sites[id];
  if (here.places.empty()) s.busy[warp].push_back(id), here.access = access;
  const uint32_t round = here.rounds[lane]++;
  if (here.places.size() < 32 * (round + 1)) here.places.resize(32 * (round + 1));
  here.places[32 * round + lane] = {in_array ? address : address | uint64_t{1} << 63, bytes};
}

}  // namespace

void Count::operator+=(const Count& other) {
  instructions += other.instructions, asked += other.asked, useful += other.useful;
  sectors += other.sectors, distinct += other.distinct;
}

void* array(const std::string& name, uint64_t bytes, uint64_t offset) {
  State& s = state();
  const uint64_t begin = s.used, end = begin + (offset + bytes + kPage) / kPage * kPage;
  if (end + kPage > kSpace) throw error("simt: the arrays of a case are too large");
  const std::vector<uint64_t> none((end - begin) / kSector / 64 + 1);
  s.ranges.push_back({name, begin, end, none, none});
  for (uint64_t page = begin / kPage; page < end / kPage; ++page)
    s.range_of_page[page] = static_cast<uint16_t>(s.ranges.size() - 1);
  s.used = end + kPage;
  s.arrays[name];
  return s.space + begin + offset;
}

void forget() {
  State& s = state();
  madvise(s.space, s.used, MADV_DONTNEED);
  std::fill_n(s.range_of_page.begin(), s.used / kPage + 1, uint16_t{0});
  s.used = 0;
  s.ranges.resize(1);
  s.arrays.clear();
  s.shared = {};
}

void shared_array(const void* p, uint64_t bytes) {
  State& s = state();
  if (s.n_shared == 256) throw error("simt: too many shared arrays to count");
  const auto begin = reinterpret_cast<uint64_t>(p);
  s.first_shared = std::min(s.first_shared, begin), s.last_shared = std::max(s.last_shared, begin + bytes);
  s.shared_begin[s.n_shared] = begin, s.shared_bytes[s.n_shared] = bytes;
  ++s.n_shared;
}

const std::map<std::string, OfArray>& arrays() { return state().arrays; }
const Shared& shared() { return state().shared; }

void touch_at(uint64_t site, const void* to, uint64_t bytes, Access access) {
  State& s = state();
  if (cur == nullptr || s.uncounted) return;
  const auto address = reinterpret_cast<uint64_t>(to), place = address - reinterpret_cast<uint64_t>(s.space);
  const bool in_array = place < kSpace;
  if (!in_array && !is_shared(address)) return;
  if (in_array && s.range_of_page[place / kPage] == 0) fail("an access outside of all arrays");
  uint64_t piece = 0;
  for (uint64_t done = 0; done < bytes; done += 16, ++piece)  // no instruction moves more than 16 bytes per lane
    record(site * 64 + piece % 64, in_array, (in_array ? place : address) + done,
           static_cast<uint32_t>(std::min<uint64_t>(16, bytes - done)), access);
}

__attribute__((noinline)) void touch(const void* address, uint64_t bytes, Access access) {
  touch_at(reinterpret_cast<uint64_t>(__builtin_return_address(0)), address, bytes, access);
}

void warp_synchronised(unsigned warp) {
  State& s = state();
  for (const uint32_t id : s.busy[warp]) {
    Site& site = s.of_warp[warp][id];
    for (size_t at = 0; at < site.places.size(); at += 32) {
      const Place* lanes = &site.places[at];
      uint64_t all = 0;
      for (int lane = 0; lane < 32; ++lane) all |= lanes[lane].address;
      if (all >> 63)
        count_shared(lanes, site.access);
      else
        count_global(lanes, site.access);
    }
    site.places.clear();
    std::fill_n(site.rounds, 32, 0u);
  }
  s.busy[warp].clear();
}

void end_of_block() {
  for (unsigned warp = 0; warp * 32 < machine.n_threads; ++warp) warp_synchronised(warp);
}

void end_of_launch() {
  State& s = state();
  for (Range& r : s.ranges) {
    const auto take = [](Count& count, std::vector<uint64_t>& bits) {
      for (uint64_t& word : bits) count.distinct += static_cast<unsigned>(std::popcount(word)), word = 0;
    };
    if (r.name.empty()) continue;
    take(s.arrays[r.name].loads, r.read), take(s.arrays[r.name].stores, r.written);
  }
}

Uncounted::Uncounted() { ++state().uncounted; }
Uncounted::~Uncounted() { --state().uncounted; }

}  // namespace simt::traffic

// ---- The callbacks of the compiler's instrumentation

using simt::traffic::Access;
using simt::traffic::touch_at;

#define SITE reinterpret_cast<uint64_t>(__builtin_return_address(0))
#define SIMT_ACCESS(bytes)                                                                 \
  void __tsan_read##bytes(void* p) { touch_at(SITE, p, bytes, Access::load); }             \
  void __tsan_write##bytes(void* p) { touch_at(SITE, p, bytes, Access::store); }           \
  void __tsan_unaligned_read##bytes(void* p) { touch_at(SITE, p, bytes, Access::load); }   \
  void __tsan_unaligned_write##bytes(void* p) { touch_at(SITE, p, bytes, Access::store); } \
  void __tsan_volatile_read##bytes(void* p) { touch_at(SITE, p, bytes, Access::load); }    \
  void __tsan_volatile_write##bytes(void* p) { touch_at(SITE, p, bytes, Access::store); }

#define SIMT_ATOMIC(bits)                                                                                           \
  uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* p, int) {                                         \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                    \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_strong(uint##bits##_t* p, uint##bits##_t* old, uint##bits##_t to, int, \
                                                    int) {                                                          \
    return __atomic_compare_exchange_n(p, old, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                      \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t bytes) { touch_at(SITE, p, bytes, Access::load); }
void __tsan_write_range(void* p, size_t bytes) { touch_at(SITE, p, bytes, Access::store); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
SIMT_ATOMIC(8)
SIMT_ATOMIC(32)
SIMT_ATOMIC(64)
}
