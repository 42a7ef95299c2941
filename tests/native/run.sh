#!/usr/bin/env bash
# Builds and runs the native tests: run.sh MODE [text], text choosing the cases whose name contains it.
#   plain         CPU kernels
#   asan          CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#   emulate       CUDA kernels in the CUDA checker, four schedules
#   emulate-asan  the same under both sanitizers
#   race          CUDA kernels in the checker under ThreadSanitizer: races inside a block; SIMT_RACE=inter between blocks
#   gpu           CUDA kernels on the GPU of this machine
set -euo pipefail

mode=${1:?usage: run.sh plain|asan|emulate|emulate-asan|race|gpu [text]}
shift
sanitize=
case $mode in
  plain) backend=cpu ;;
  asan) backend=cpu sanitize=address,undefined ;;
  emulate) backend=emulate ;;
  emulate-asan) backend=emulate sanitize=address,undefined ;;
  race) backend=emulate sanitize=thread ;;
  gpu) backend=gpu ;;
  *) echo "run.sh: unknown mode $mode" >&2; exit 2 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=$(cd "$here/../.." && pwd)/build/native-$mode
mkdir -p "$build"
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S "$here" -B "$build" "${generator[@]}" -DUNLEARN_TEST_BACKEND=$backend -DUNLEARN_SANITIZE=$sanitize \
  >"$build.log" || { cat "$build.log"; exit 1; }
cmake --build "$build" --parallel "${JOBS:-$(nproc)}"

export ASAN_OPTIONS=detect_stack_use_after_return=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
if [ $backend = emulate ] && [ "$sanitize" != thread ]; then
  ASAN_OPTIONS=detect_leaks=0:$ASAN_OPTIONS "$build/test_simt"  # a reported misuse abandons the stacks of its threads
fi
exec "$build/test_kernels" "$@"
