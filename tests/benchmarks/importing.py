"""How long `import comfy_executors` takes, against importing its four dependencies."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from .report import Line

_PROGRAM = """
import time
started = time.perf_counter()
import {}
print(time.perf_counter() - started)
"""


def _seconds(modules: str) -> float:
    program = _PROGRAM.format(modules)
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(answer.stdout)


def measure(short: bool) -> Iterator[Line]:
    """Measure imports in fresh interpreters, in turns."""
    floor, ours = [], []
    for _ in range(10 if short else 40):
        floor.append(_seconds("jinja2, requests, tenacity, websocket"))
        ours.append(_seconds("comfy_executors"))
    ratio = statistics.median(ours) / statistics.median(floor)
    yield Line(
        "import comfy_executors against its four dependencies",
        "<= 1.3x",
        f"{ratio:.3f}x ({statistics.median(ours) * 1e3:.0f} ms, "
        f"dependencies {statistics.median(floor) * 1e3:.0f} ms)",
        ratio <= 1.3,
    )
