#!/usr/bin/env bash
# Builds and runs the native tests: run.sh [--build|--run] MODE [text], text choosing the cases whose name contains it;
# --build and --run do half of it.
#   plain         CPU kernels
#   asan          CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#   clang         CPU kernels, built with Clang: CLANGXX=..., or the newest on PATH; clang-asan: under both sanitizers
#   aarch64       CPU kernels, built by a cross compiler and run by QEMU
#   emulate       CUDA kernels in the CUDA checker, four schedules
#   emulate-asan  the same under both sanitizers, one schedule
#   race          CUDA kernels in the checker under ThreadSanitizer, one schedule: races inside a block
#   race-inter    the same, races between blocks
#   traffic       CUDA kernels in the checker, their memory accesses counted and held to traffic.json
#   gpu           CUDA kernels on the GPU of this machine
# The races are looked for on reduced sizes: UNLEARN_REDUCED=0 asks for all of them, 1 or 2 in any mode for part.
set -euo pipefail

build_it=1 run_it=1
case ${1:-} in
  --build) run_it=; shift ;;
  --run) build_it=; shift ;;
esac
mode=${1:?usage: run.sh [--build|--run] plain|asan|clang|clang-asan|aarch64|emulate|emulate-asan|race|race-inter|traffic|gpu [text]}
shift
sanitize=
emulator=()
case $mode in
  plain) backend=cpu ;;
  asan) backend=cpu sanitize=address,undefined ;;
  clang) backend=cpu ;;
  clang-asan) backend=cpu sanitize=address,undefined ;;
  aarch64) backend=cpu ;;
  emulate) backend=emulate ;;
  emulate-asan) backend=emulate sanitize=address,undefined ;;
  race | race-inter) backend=emulate sanitize=thread ;;
  traffic) backend=traffic ;;
  gpu) backend=gpu ;;
  *) echo "run.sh: unknown mode $mode" >&2; exit 2 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configure=()
case $mode in
  clang*)
    clang=${CLANGXX:-$(compgen -c clang++ | grep -xE 'clang\+\+(-[0-9]+)?' | sort -uV | tail -n 1 || true)}
    [ "$clang" ] || { echo "run.sh: $mode needs Clang (Debian: clang-16): on PATH, or named in CLANGXX" >&2; exit 1; }
    configure=(-DCMAKE_CXX_COMPILER="$clang")
    ;;
  aarch64)
    configure=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++)
    qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
    [ "$qemu" ] && command -v aarch64-linux-gnu-g++ >/dev/null ||
      { echo "run.sh: aarch64 needs g++-aarch64-linux-gnu, and qemu-user or qemu-user-static" >&2; exit 1; }
    emulator=("$qemu" -L /usr/aarch64-linux-gnu)
    ;;
esac
build=$(cd "$here/../.." && pwd)/build/native-${mode%-inter}
if [ "$build_it" ]; then
  mkdir -p "$build"
  if command -v ninja >/dev/null; then configure+=(-G Ninja); fi
  cmake -S "$here" -B "$build" "${configure[@]}" -DUNLEARN_TEST_BACKEND=$backend -DUNLEARN_SANITIZE=$sanitize \
    >"$build.log" || { cat "$build.log"; exit 1; }
  cmake --build "$build" --parallel "${JOBS:-$(nproc)}"
  if [ $mode = clang ]; then  # for g++'s build of the package tests/test_build.py says the same
    weak=$(nm -A -C $(find "$build" -path '*kernels_avx*' -name '*.o') | grep -E ' [WVu] ' | grep -v ' DW.ref' || true)
    [ -z "$weak" ] || { echo "run.sh: weak: the linker may keep the copy for another CPU: $weak" >&2; exit 1; }
  fi
fi
[ "$run_it" ] || exit 0
if [ $mode = traffic ]; then
  exec "${PYTHON:-python3}" "$here/traffic.py" --program "${UNLEARN_TEST_PROGRAM:-$build/test_kernels}" "$@"
fi

export ASAN_OPTIONS=detect_stack_use_after_return=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
run=("${emulator[@]}")
if [ "$sanitize" = thread ]; then
  export TSAN_OPTIONS=halt_on_error=1:${TSAN_OPTIONS:-}
  if [ "$mode" = race ]; then
    export UNLEARN_REDUCED=${UNLEARN_REDUCED-1}
  else
    export UNLEARN_REDUCED=${UNLEARN_REDUCED-2} SIMT_RACE=inter
  fi
  # GCC's ThreadSanitizer cannot place its shadow if addresses are randomised in more bits than this.
  if [ "$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 0)" -gt 28 ]; then run=(setarch "$(uname -m)" -R); fi
elif [ $backend = emulate ] && [ $# = 0 ]; then
  ASAN_OPTIONS=detect_leaks=0:$ASAN_OPTIONS "$build/test_simt"  # a reported misuse abandons the stacks of its threads
fi
exec "${run[@]}" "${UNLEARN_TEST_PROGRAM:-$build/test_kernels}" "$@"
