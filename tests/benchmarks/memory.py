"""How much memory a run takes whose images come faster than they are consumed."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate

from .report import Line
from .serving import Helper
from .throughput import bench_graph

_SIZE = 592  # pixels: 3 * 592 * 592 bytes of noise make a PNG of 1.05 MB
_MEGABYTE = 1e6


def _resident(field: str) -> float:
    """Return `VmRSS` or `VmHWM` (its peak) of this process, in bytes; Linux only.

    `ru_maxrss` would do elsewhere, but a child inherits it from its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def consume(address: str, images: int, batch_size: int, seconds: float, output_dir: str) -> None:
    """Consume a run slowly and print the peak of the memory above the start, in bytes.

    What is measured is resident memory, so that what the allocator keeps is counted too.
    """
    graph = bench_graph(0, 0.0, _SIZE)
    graph["1"]["inputs"]["batch_size"] = "BATCH"
    text = json.dumps(graph).replace('"BATCH"', "{{ batch_size }}")
    start = _resident("VmRSS")
    taken = size = 0
    with ComfyServerWorkflowExecutor(address, batch_size=batch_size) as executor:
        for image in executor.submit_workflow(
            WorkflowTemplate(text), num_samples=images, output_dir=output_dir or None
        ):
            if output_dir and (image.path is None or not image.path.is_file()):
                raise RuntimeError(f"{image!r} was not saved")
            size = max(size, len(image.data))
            taken += 1
            time.sleep(seconds)
    if taken != images or size < _MEGABYTE:
        raise RuntimeError(f"{taken} images came of {images}, of {size} bytes")
    print(_resident("VmHWM") - start)


def measure(short: bool) -> Iterator[Line]:
    """Measure the peak with and without `output_dir`, a fresh process each.

    A consumer that takes 5 ms may be faster than the server, which makes the bound easy to keep;
    one that takes 50 ms is not. Then seven batches are held: those at the server, two more, and
    the one that is consumed. In batches of 8 that is 59 MB, and the allocator keeps some more.
    """
    images = 100 if short else 2000
    cases = [
        (images, 8, 0.005, False, 64),
        (images, 8, 0.005, True, 32),
        (images // (2 if short else 10), 4, 0.05, False, 64),
    ]
    if not short:
        cases += [(images // 10, 8, 0.05, False, 100), (images // 10, 4, 0.05, True, 32)]
    for count, batch_size, seconds, saving, target in cases:
        peak = _peak(count, batch_size, seconds, saving) / _MEGABYTE
        yield Line(
            f"memory, {count} images of 1 MB in batches of {batch_size}, "
            f"{seconds * 1e3:.0f} ms each" + (", output_dir" if saving else ""),
            f"< {target} MB",
            f"{peak:.1f} MB",
            peak < target,
        )


def _peak(images: int, batch_size: int, seconds: float, saving: bool) -> float:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        arguments = (str(images), str(batch_size), str(seconds), folder if saving else "")
        with Helper("serving") as server, Helper("memory", (server.hello, *arguments)) as run:
            return float(run.hello)


if __name__ == "__main__":
    consume(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
