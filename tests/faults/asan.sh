#!/usr/bin/env bash
# Random calls of every op (op_fuzz.py) with the extension built under AddressSanitizer and UndefinedBehaviorSanitizer:
# asan.sh [options of op_fuzz.py, by default --calls 21000 --seed 1000000]. PYTHON names the interpreter for whose torch
# it is built. The first error ends the run. Builds in build/asan, with a copy of the Python, and leaves the package alone.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
build=${UNLEARN_ASAN_BUILD:-$root/build/asan}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
mkdir -p "$build"
cmake -S "$root" -B "$build" "${generator[@]}" -DPython_EXECUTABLE="$(command -v "$python")" -DUNLEARN_CUDA=OFF \
  -DUNLEARN_SANITIZE=address,undefined >"$build/configure.log" || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --target _C --parallel "${JOBS:-$(nproc)}"

package=$build/package/unlearn_ext
rm -rf "$package"
mkdir -p "$package"
(cd "$root/unlearn_ext" && find . -name '*.py' -exec cp --parents {} "$package" \;)
cp "$build"/_C*.so "$build/_build_info.json" "$package"

export PYTHONPATH=$build/package${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:${ASAN_OPTIONS:-}
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:${UBSAN_OPTIONS:-}
preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so)"
[ $# -gt 0 ] || set -- --calls 21000 --seed 1000000
cd "$build"
LD_PRELOAD=$preload "$python" -c "
import unlearn_ext._C as module
assert module.__file__.startswith('$package/'), module.__file__"
LD_PRELOAD=$preload exec "$python" "$root/tests/faults/op_fuzz.py" "$@"
