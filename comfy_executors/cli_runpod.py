"""RunPod on the command line: `run … --runpod`, `runpod health` and `runpod smoke`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from comfy_executors.cli_delivery import DELIVERED, UsageError
from comfy_executors.cli_smoke import Smoke
from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.clients.runpod import BASE_URL, RunPodClient
from comfy_executors.clients.runpod_answers import CANCELLED, COMPLETED, TERMINAL
from comfy_executors.errors import JobLostError
from comfy_executors.executors.runpod_pace import Pace

if TYPE_CHECKING:
    from comfy_executors.executors.runpod import RunPodWorkflowExecutor

# The names of executors/runpod.py, which is imported by those who use it.
_WORKERS = ("auto", "comfy-executors", "worker-comfyui")
# The RunPod SDK's own name for it.
_BASE_URL_VARIABLE = "RUNPOD_ENDPOINT_BASE_URL"
_HEALTH_SECONDS = 30.0
_NOT_KNOWN = "not known any more"


def add_runpod_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes for RunPod."""
    parser.add_argument(
        "--runpod",
        metavar="ENDPOINT",
        help="run on this RunPod endpoint, with the key in $RUNPOD_API_KEY, instead of a server",
    )
    _add_worker(parser)


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
            base_url=_base_url(),
            batch_size=batch_size,
            worker=worker,
            batches_per_job=batches_per_job,
            max_workers=max_workers,
            queue_timeout=queue_timeout,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _base_url() -> str:
    return os.environ.get(_BASE_URL_VARIABLE) or BASE_URL


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


def _smoke(args: argparse.Namespace) -> int:
    with make_runpod_executor(
        args.endpoint, worker=args.worker, queue_timeout=args.timeout
    ) as executor:

        def workers(smoke: Smoke) -> None:
            counts = asdict(executor.health(DeadlineWaiter(_HEALTH_SECONDS)).workers)
            shown = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
            smoke.tell(f"the endpoint answers: {shown or 'no'} workers")

        def images(smoke: Smoke) -> None:
            smoke.images()
            smoke.tell(f"the worker is {executor.found_worker}")

        def cancelling(smoke: Smoke) -> None:
            with contextlib.closing(RunPodClient(args.endpoint, base_url=_base_url())) as client:
                smoke.cancelling(partial(_states, client), {CANCELLED, _NOT_KNOWN}, COMPLETED)

        return Smoke(executor, args.timeout).run(workers, images, cancelling)


def _states(client: RunPodClient, job_id: str, waiter: Waiter) -> Iterator[str]:
    """Tell a job's state until it is final, with pauses between."""
    pace = Pace(lambda: client.is_crowded)
    try:
        while (state := client.status(job_id, waiter).status) not in TERMINAL:
            yield state
            pace.rest(waiter)
    except JobLostError:
        state = _NOT_KNOWN
    yield state
