// The most multiplications and additions per second that the given number of threads can do in float32: fused
// multiply-adds on registers, with nothing to load. Prints operations per second.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kWidth)));
constexpr int kChains = 12;  // as many as hide the latency of one and fit in 16 registers
constexpr long kRounds = 20'000'000;

static void work(float* out) {
  Vector sums[kChains], factor, term;
  for (int i = 0; i < kWidth; ++i) factor[i] = 0.999f, term[i] = 1e-3f;
  for (int c = 0; c < kChains; ++c) sums[c] = term * static_cast<float>(c);
  for (long round = 0; round < kRounds; ++round)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + term;
  for (int c = 1; c < kChains; ++c) sums[0] += sums[c];
  *out = sums[0][0];
}

int main(int argc, char** argv) {
  const int n = argc > 1 ? std::atoi(argv[1]) : 1;
  std::vector<float> results(static_cast<size_t>(n));
  double best = 1e30;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (float& result : results) threads.emplace_back(work, &result);
    for (std::thread& thread : threads) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds < best) best = seconds;
  }
  for (const float result : results)
    if (!(result > 0)) return 1;  // results are used
  std::printf("%.6g\n", 2.0 * kWidth * kChains * kRounds * n / best);
}
