#!/usr/bin/env bash
# Every CUDA kernel in every mode of the CUDA checker: builds, runs, and prints what each mode did. A mode that fails
# does not keep the others from running.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=$(cd "$here/../.." && pwd)/build
modes=(emulate-asan race-inter emulate race)

for mode in emulate emulate-asan race; do
  start=$SECONDS
  "$here/run.sh" --build $mode || exit 1
  echo "built $mode in $((SECONDS - start)) s"
done
printf '%s\n' "${modes[@]}" |
  xargs -P "$(nproc)" -I{} sh -c '"$1/run.sh" --run $2 >"$3/native-$2.out" 2>&1; echo $? >"$3/native-$2.status"' \
    sh "$here" {} "$build"

failed=()
for mode in "${modes[@]}"; do
  if [ "$(cat "$build/native-$mode.status")" = 0 ]; then continue; fi
  failed+=("$mode")
  echo "---- $mode failed, see build/native-$mode.out:"
  cut -c1-300 "$build/native-$mode.out" | grep -vE '^ok ' | head -60
done
for mode in "${modes[@]}"; do printf '%-13s %s\n' $mode "$(tail -n 1 "$build/native-$mode.out" | cut -c1-150)"; done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
