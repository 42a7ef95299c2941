"""Selections of sharded tensors with heavy ties: are they, case by case, those of the gathered ones?

    python tests/distributed/selections.py --cases 1000

`test_sharded_ops.py` does some of them.
"""

import argparse
import time

from rank_pool import RankPool


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=100)
    settings = parser.parse_args()
    started, done, wrong = time.monotonic(), 0, 0
    for world in (2, 3):
        pool = RankPool(world)
        try:
            for start in range(0, settings.cases // 2, 50):
                n = min(50, settings.cases // 2 - start)
                found = pool.run("sharded_ops", "selections", n, settings.seed + done)
                done, wrong = done + n, wrong + max(found)
                seconds = time.monotonic() - started
                print(f"{done} cases, {wrong} wrong, {world} ranks ({seconds:.0f} s)", flush=True)
        finally:
            pool.close()
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
