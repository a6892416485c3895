"""A sampler-shaped node for tests and benchmarks: noise in a given time, failures on request."""

from __future__ import annotations

import io
import time

from PIL import Image

from comfy_executors.devserver.nodes import NodeContext, NodeResult, node
from comfy_executors.devserver.painting import noise


@node("BenchSampler")
def bench_sampler(
    context: NodeContext,
    seed: int,
    width: int,
    height: int,
    batch_size: int,
    steps: int,
    seconds: float,
    fail: str,
    text: str,
    previews: bool = False,
) -> NodeResult:
    deadline = time.monotonic()
    images = [noise(seed, index, width, height) for index in range(batch_size)]
    preview = (_jpeg(images[0]), "image/jpeg") if previews else None
    for step in range(1, steps + 1):
        context.wait_until(deadline + seconds * step / steps)
        context.progress(step, steps, preview)
    if fail:
        raise RuntimeError(fail)
    for image in images:
        # Trying to compress noise would take most of the time that saving it takes.
        image.info["compress_level"] = 0
    return NodeResult((images, text))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()
