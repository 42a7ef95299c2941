#include "harness.h"

#include <chrono>
#include <cstdio>

namespace unlearn_ext::test {
namespace {

struct Registered {
  const char* name;
  std::function<void()> run;
};
std::vector<Registered>& cases() {
  static std::vector<Registered> all;
  return all;
}
std::vector<std::string> scopes;
int64_t cases_run = 0, checks = 0, failures = 0;

void run_all(const char* filter) {
  for (const Registered& c : cases()) {
    if (filter != nullptr && std::strstr(c.name, filter) == nullptr) continue;
    ++cases_run;
    rng().seed(20240);  // every case alone gives what it gives among the others
    const Scope scope(c.name);
    try {
      c.run();
    } catch (const std::exception& error) {
      scopes.resize(std::min<size_t>(scopes.size(), 2));
      failed(error.what(), std::source_location::current());
    }
  }
}

}  // namespace

void passed() { ++checks; }

void failed(const std::string& what, std::source_location where) {
  ++checks;
  if (++failures > 40) return;
  std::printf("FAIL %s:%u", where.file_name(), static_cast<unsigned>(where.line()));
  for (const std::string& scope : scopes) std::printf(" | %s", scope.c_str());
  std::printf(": %s\n", what.c_str());
  if (std::getenv("UNLEARN_STOP_AT_FAILURE") == nullptr) return;
  std::fflush(stdout);
  std::_Exit(1);
}

Scope::Scope(std::string text) { scopes.push_back(std::move(text)); }
Scope::~Scope() { scopes.pop_back(); }

Case::Case(const char* name, std::function<void()> run) { cases().push_back({name, std::move(run)}); }

}  // namespace unlearn_ext::test

// test_kernels [text]: all cases, or those whose name contains the text.
int main(int argc, char** argv) {
  using namespace unlearn_ext::test;
  const char* filter = argc > 1 ? argv[1] : nullptr;
  const auto start = std::chrono::steady_clock::now();
  uint64_t launches = 0;
#if defined(UNLEARN_EMULATE)
  const std::pair<simt::Order, uint64_t> schedules[] = {
      {simt::Order::fwd, 0}, {simt::Order::rev, 0}, {simt::Order::rand, 1}, {simt::Order::rand, 2}};
  const char* names[] = {"forward", "reverse", "random 1", "random 2"};
  // What sanitizers report shows in nearly any order: for them one is enough, and all that time allows.
  for (int i = simt::kSanitized ? 3 : 0; i < 4; ++i) {
    simt::config().order = schedules[i].first;
    simt::config().seed = schedules[i].second;
    const Scope scope(names[i]);
    run_all(filter);
  }
  launches = simt::stats().launches;
#else
#if defined(UNLEARN_TEST_GPU)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device\n");
    return 77;
  }
#endif
  run_all(filter);
#endif
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%lld cases, %lld checks, %llu emulated launches, %.1f s: %lld failed\n",
              static_cast<long long>(cases_run), static_cast<long long>(checks),
              static_cast<unsigned long long>(launches), seconds, static_cast<long long>(failures));
  return failures != 0;
}
