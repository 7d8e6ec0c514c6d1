"""``python -m tests.fuzz``: look for findings for some minutes, or have one again."""

from __future__ import annotations

import argparse
import sys
import time

import tests.conftest  # noqa: F401  Triton's interpreter, before a kernel is imported


def main() -> int:
    from tests.fuzz.run import AREAS, check, run

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--area", choices=list(AREAS), action="append")
    parser.add_argument("--case", type=int, help="one case of the area")
    options = parser.parse_args()
    areas = options.area or list(AREAS)
    seed = int(time.time()) if options.seed is None else options.seed
    if options.case is not None:
        check(areas[0], seed, options.case)
        return 0
    began = time.monotonic()
    counts, found = run(options.seconds, seed, areas)
    for finding in found:
        print(finding, file=sys.stderr)
    listed = ", ".join(f"{area} {counts[area]}" for area in areas)
    took = time.monotonic() - began
    print(f"seed {seed}, {took:.0f} s: {len(found)} findings in {counts.total()} cases: {listed}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
