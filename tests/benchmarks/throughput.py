"""How fast: against a floor written by hand, near and far; and how idle the server stands."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate

from .floor import run_floor
from .report import Line
from .serving import Helper, spans

ONE_WAY_SECONDS = 0.025
_seeds = itertools.count(1, 1_000_000)


def bench_graph(seed: int, seconds: float, size: int = 64, images: int = 1) -> dict[str, Any]:
    """Return a graph that makes images of noise.

    Args:
        seed: The noise's seed.
        seconds: How long it takes.
        size: Width and height, in pixels.
        images: How many.
    """
    sampler = {
        "seed": seed,
        "width": size,
        "height": size,
        "batch_size": images,
        "steps": 4,
        "seconds": seconds,
        "fail": "",
        "text": "",
    }
    return {
        "1": {"class_type": "BenchSampler", "inputs": sampler},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "b"}},
    }


def run_ours(address: str, prompts: int, seconds: float, images: int = 1) -> int:
    """Run a workflow of so many images a batch and return the number of bytes that came."""
    seed = next(_seeds)
    graph = bench_graph(0, seconds)
    graph["1"]["inputs"]["batch_size"] = "BATCH"
    template = WorkflowTemplate(json.dumps(graph).replace('"BATCH"', "{{ batch_size }}"))
    with ComfyServerWorkflowExecutor(address, batch_size=images) as executor:
        run = executor.submit_workflow(template, num_samples=prompts * images, seed=seed)
        sizes = [len(image.data) for image in run]
    if len(sizes) != prompts * images:
        raise RuntimeError(f"{len(sizes)} images came of {prompts * images}")
    return sum(sizes)


def _floor(address: str, prompts: int, seconds: float, images: int, threads: int) -> int:
    seed = next(_seeds)
    graphs = [bench_graph(seed + index, seconds, images=images) for index in range(prompts)]
    return run_floor(address, graphs, threads)


def _timed(work: Callable[[], int]) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _gaps(server: Helper) -> list[float]:
    times = spans(server)
    return [later[0] - earlier[1] for earlier, later in zip(times, times[1:])]


def compare(
    server: Helper,
    address: str,
    prompts: int,
    seconds: float,
    images: int,
    threads: int,
    rounds: int,
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Run floor and library in turns; return their seconds and the gaps of the server."""
    times: tuple[list[float], list[float]] = ([], [])
    gaps: tuple[list[float], list[float]] = ([], [])
    works = (
        lambda: _floor(address, prompts, seconds, images, threads),
        lambda: run_ours(address, prompts, seconds, images),
    )
    for turn in range(rounds):
        # Who begins changes, so that a machine that gets slower favours nobody.
        for which in (0, 1) if turn % 2 else (1, 0):
            server.ask("reset")
            times[which].append(_timed(works[which]))
            gaps[which].extend(_gaps(server))
    return (*times, *gaps)


def measure(short: bool) -> Iterator[Line]:
    """Measure throughput and idle gaps, near and far."""
    with Helper("serving") as server:
        near = server.hello
        with Helper("delay_line", (near, str(ONE_WAY_SECONDS))) as line:
            # Far away one thread is too slow to post as fast as the server works; near, more
            # threads than one make little difference. Ours are four for each of two batches, where
            # a batch has eight images.
            cases = (
                ("near, prompts of 0 s", near, 0.0, 1, 1, 1.15),
                ("near, prompts of 50 ms", near, 0.05, 1, 1, 1.03),
                ("25 ms each way, prompts of 50 ms", line.hello, 0.05, 1, 4, 1.10),
                ("25 ms each way, 50 ms, 8 images", line.hello, 0.05, 8, 8, 1.10),
            )
            for what, address, seconds, images, threads, target in cases:
                prompts = (60 if short and seconds else 200) // (2 if images > 1 else 1)
                rounds = (2 if short else 5) if seconds else 9
                runs = compare(server, address, prompts, seconds, images, threads, rounds)
                yield from _lines(what, target, *runs)


def _lines(
    what: str,
    target: float,
    floor: list[float],
    ours: list[float],
    floor_gaps: list[float],
    gaps: list[float],
) -> Iterator[Line]:
    ratio = statistics.median(o / f for o, f in zip(ours, floor))
    yield Line(
        f"time against the floor, {what}",
        f"<= {target}x",
        f"{ratio:.3f}x ({statistics.median(ours):.2f} s, floor {statistics.median(floor):.2f} s)",
        ratio <= target,
    )
    gap, tail = statistics.median(gaps), statistics.quantiles(gaps, n=20)[-1]
    yield Line(
        f"idle gap of the server, {what}",
        "< 2 ms",
        f"{gap * 1e3:.2f} ms (95%: {tail * 1e3:.1f} ms; "
        f"floor {statistics.median(floor_gaps) * 1e3:.2f} ms)",
        gap < 0.002,
    )
