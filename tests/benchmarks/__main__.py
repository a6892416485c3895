"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import sys

from . import importing, memory, modal, runpod, throughput

_BENCHMARKS = {
    "import": importing.measure,
    "throughput": throughput.measure,
    "memory": memory.measure,
    "runpod": runpod.measure,
    "modal": modal.measure,
}


def main() -> int:
    """Run the benchmarks that were asked for; 1 when a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *_BENCHMARKS], metavar="name")
    parser.add_argument("--short", action="store_true", help="about a minute, less exact")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    missed = 0
    for name in options.names or _BENCHMARKS:
        for line in _BENCHMARKS[name](options.short):
            print(line, flush=True)
            missed += not line.met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
