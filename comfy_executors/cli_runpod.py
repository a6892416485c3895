"""RunPod on the command line: `run … --runpod`, `runpod health` and `runpod smoke`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import asdict
from typing import TYPE_CHECKING

from comfy_executors.cli_delivery import DELIVERED, FAILED, UsageError, error_text
from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.clients.runpod import BASE_URL
from comfy_executors.errors import ComfyExecutorsError
from comfy_executors.workflows import WorkflowTemplate

if TYPE_CHECKING:
    from comfy_executors.executors.runpod import RunPodWorkflowExecutor

# The names of executors/runpod.py, which is imported by those who use it.
_WORKERS = ("auto", "comfy-executors", "worker-comfyui")
# The RunPod SDK's own name for it.
_BASE_URL_VARIABLE = "RUNPOD_ENDPOINT_BASE_URL"
_HEALTH_SECONDS = 30.0
# Nodes of ComfyUI itself, and no model.
_SMOKE_TEMPLATE = """{
  "1": {"class_type": "EmptyImage", "inputs":
        {"width": 64, "height": 64, "batch_size": 1, "color": {{ seed % 16777216 }}}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "smoke"}}
}"""


def add_runpod_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes for RunPod."""
    parser.add_argument(
        "--runpod",
        metavar="ENDPOINT",
        help="run on this RunPod endpoint, with the key in $RUNPOD_API_KEY, instead of a server",
    )
    _add_worker(parser)
    parser.add_argument(
        "--batches-per-job",
        metavar="N",
        type=int,
        help="for --runpod: spread the run over jobs of N batches; default: one job",
    )


def add_runpod_commands(parser: argparse.ArgumentParser) -> None:
    """Add `health` and `smoke`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    words = "tell how many jobs wait and what the workers do"
    health = commands.add_parser("health", help=words, description=words, allow_abbrev=False)
    health.set_defaults(command=_health)
    health.add_argument("--json", action="store_true", help="write it as JSON")
    words = "run two tiny images and a cancellation on an endpoint, and tell what works"
    smoke = commands.add_parser("smoke", help=words, description=words, allow_abbrev=False)
    smoke.set_defaults(command=_smoke)
    _add_worker(smoke)
    smoke.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=900.0, help="default: %(default)s"
    )
    for command in (health, smoke):
        command.add_argument("endpoint", metavar="ENDPOINT", help="the endpoint's id")


def _add_worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--worker", choices=_WORKERS, default="auto", help="what the endpoint runs; default: auto"
    )


def make_runpod_executor(
    endpoint: str,
    *,
    worker: str,
    batch_size: int = 1,
    batches_per_job: int | None = None,
    max_workers: int = 4,
    queue_timeout: float = 900.0,
) -> RunPodWorkflowExecutor:
    """Make an executor of what is on the command line and in the environment.

    Raises:
        UsageError: It cannot be made.
    """
    from comfy_executors.executors import runpod

    try:
        return runpod.RunPodWorkflowExecutor(
            endpoint,
            base_url=os.environ.get(_BASE_URL_VARIABLE) or BASE_URL,
            batch_size=batch_size,
            worker=worker,
            batches_per_job=batches_per_job,
            max_workers=max_workers,
            queue_timeout=queue_timeout,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _health(args: argparse.Namespace) -> int:
    with make_runpod_executor(args.endpoint, worker="auto") as executor:
        health = executor.health(DeadlineWaiter(_HEALTH_SECONDS))
    if args.json:
        print(json.dumps(asdict(health)))
        return DELIVERED
    for name, counts in (("jobs", health.jobs), ("workers", health.workers)):
        words = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in asdict(counts).items())
        print(f"{name}: {words}")
    return DELIVERED


def _check_cancelling(
    executor: RunPodWorkflowExecutor, template: WorkflowTemplate, timeout: float
) -> None:
    queued = threading.Event()
    run = executor.submit_workflow(
        template,
        timeout=timeout,
        on_progress=lambda event: queued.set() if event.kind in ("queued", "failed") else None,
    )
    queued.wait()
    run.cancel()
    with contextlib.suppress(CancelledError):
        run.result()


def _smoke(args: argparse.Namespace) -> int:
    template = WorkflowTemplate(_SMOKE_TEMPLATE)
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    with make_runpod_executor(
        args.endpoint, worker=args.worker, queue_timeout=args.timeout
    ) as executor:
        try:
            workers = asdict(executor.health(DeadlineWaiter(_HEALTH_SECONDS)).workers)
            shown = ", ".join(f"{n} {state}" for state, n in workers.items() if n)
            tell(f"the endpoint answers: {shown or 'no'} workers")
            run = executor.submit_workflow(template, num_samples=2, timeout=args.timeout)
            for result in (future.result() for future in run.futures):
                tell(f"batch {result.index} of job {result.job_id}: {len(result.images)} image")
            tell(f"the worker is {executor.found_worker}")
            _check_cancelling(executor, template, args.timeout)
            tell("a cancelled job stops")
        except ComfyExecutorsError as error:
            print(f"error: {error_text(error)}", file=sys.stderr)
            return FAILED
    return DELIVERED
