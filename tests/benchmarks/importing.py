"""How long `import comfy_executors` takes, against importing its four dependencies."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from .report import Line

_PROGRAM = """
import time
started = time.perf_counter()
import {}
print(time.perf_counter() - started)
"""
_DEPENDENCIES = "jinja2, requests, tenacity, websocket"
_TARGET = 1.3


def _seconds(modules: str, environment: Mapping[str, str]) -> float:
    program = _PROGRAM.format(modules)
    answer = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return float(answer.stdout)


def measure(short: bool) -> Iterator[Line]:
    """Measure imports in fresh interpreters, in turns, compiled as after an installation."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        # Otherwise our modules would be compiled each time, and installed ones would not.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        floor, ours = [], []
        for turn in range(-1, 10 if short else 40):
            seconds = [_seconds(what, environment) for what in (_DEPENDENCIES, "comfy_executors")]
            if turn >= 0:  # the first one compiles
                floor.append(seconds[0])
                ours.append(seconds[1])
    ratio = statistics.median(o / f for o, f in zip(ours, floor))
    yield Line(
        "import comfy_executors against its four dependencies",
        f"<= {_TARGET}x",
        f"{ratio:.3f}x ({statistics.median(ours) * 1e3:.0f} ms, "
        f"dependencies {statistics.median(floor) * 1e3:.0f} ms)",
        ratio <= _TARGET,
    )
