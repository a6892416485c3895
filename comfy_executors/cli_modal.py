"""Modal on the command line: `run … --modal`, `modal init`, `serve-local`, `health`, `smoke`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy_executors
from comfy_executors.cli_arguments import add_listening_arguments
from comfy_executors.cli_delivery import DELIVERED, UsageError
from comfy_executors.cli_smoke import Smoke
from comfy_executors.clients.comfyui import DEFAULT_PORT
from comfy_executors.clients.http import Waiter
from comfy_executors.errors import MissingExtraError
from comfy_executors.images import InputImage
from comfy_executors.workflows import WorkflowTemplate

if TYPE_CHECKING:
    from comfy_executors.clients.modal import ModalClient
    from comfy_executors.clients.modal_answers import ModalHealth
    from comfy_executors.executors.modal import ModalWorkflowExecutor

_APP_FILE = Path(__file__).with_name("workers") / "modal_app.py"
_LOCAL_PORT = 8000
_GRACE_SECONDS = 1  # for calls that are held when the local app ends
_HOLD_SECONDS = 20.0  # for which the app may hold a call while there is no news
_NEXT = """{path} is a copy of the app. Its settings are at the top. Next:
  modal deploy {path}
  comfy-executors modal smoke https://….modal.run"""
# A PNG of one pixel, so that no library is needed to make one.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478da63f8"
    "cfc0000003010100f70341430000000049454e44ae426082"
)
_INPUT_TEMPLATE = """{
  "1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "smoke"}}
}"""


def add_modal_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes for Modal."""
    parser.add_argument(
        "--modal",
        metavar="URL",
        help="run on this app on Modal, with the proxy token in $MODAL_KEY and $MODAL_SECRET, "
        "instead of a server",
    )


def add_modal_commands(parser: argparse.ArgumentParser) -> None:
    """Add `init`, `serve-local`, `health` and `smoke`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Any, words: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    init = add("init", _init, "write a copy of the app, to be changed and deployed")
    init.add_argument("path", metavar="FILE", nargs="?", default="modal_app.py")
    serve = add("serve-local", _serve_local, "serve the app on this machine until Ctrl-C")
    serve.add_argument(
        "--server",
        metavar="ADDRESS",
        default=os.environ.get("COMFYUI_URL") or f"localhost:{DEFAULT_PORT}",
        help="the ComfyUI that runs its jobs; default: $COMFYUI_URL, else %(default)s",
    )
    add_listening_arguments(serve, _LOCAL_PORT)
    health = add("health", _health, "tell whether an app is there, and how busy it is")
    health.add_argument("--json", action="store_true", help="write it as JSON")
    smoke = add("smoke", _smoke, "run a few tiny images and a cancellation, and tell what works")
    smoke.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=900.0, help="default: %(default)s"
    )
    for command in (health, smoke):
        command.add_argument("url", metavar="URL", help="the app's address")


def make_modal_executor(url: str, **options: Any) -> ModalWorkflowExecutor:
    """Make an executor of what is on the command line and in the environment.

    Raises:
        UsageError: It cannot be made.
    """
    from comfy_executors.executors import modal

    try:
        return modal.ModalWorkflowExecutor(url, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _init(args: argparse.Namespace) -> int:
    try:
        with open(args.path, "x", encoding="utf-8") as file:
            file.write(_APP_FILE.read_text("utf-8"))
    except FileExistsError:
        raise UsageError(f"{args.path} exists already: name another file") from None
    except OSError as error:
        raise UsageError(f"cannot write {args.path}: {error.strerror}") from error
    print(_NEXT.format(path=args.path))
    return DELIVERED


def _serve_local(args: argparse.Namespace) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", extra="modal-worker") from error
    from comfy_executors.workers.engine import Engine
    from comfy_executors.workers.modal_job import JobRunner
    from comfy_executors.workers.modal_local import LocalBackend
    from comfy_executors.workers.modal_web import create_web

    try:
        engine = Engine(args.server)
    except ValueError as error:
        raise UsageError(str(error)) from error
    web = create_web(LocalBackend(JobRunner(engine)))
    config = uvicorn.Config(
        web, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, lifespan="on"
    )
    # Bound here, so that its address can be told before anything is served. Ctrl-C is the ordinary
    # end of a server, from that moment on.
    with _listen(args.host, args.port) as listener, contextlib.suppress(KeyboardInterrupt):
        url = f"http://{args.host}:{listener.getsockname()[1]}"
        print(json.dumps({"url": url}) if args.json else url, flush=True)
        print(f"the app runs on {args.server} until Ctrl-C", file=sys.stderr)
        uvicorn.Server(config).run([listener])
    return DELIVERED


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error


def _health(args: argparse.Namespace) -> int:
    with make_modal_executor(args.url) as executor:
        health = executor.health()
    if args.json:
        print(json.dumps(asdict(health)))
        return DELIVERED
    print(f"comfy-executors {health.version} on {health.backend}")
    counts = {name: getattr(health, name) for name in ("queued", "running", "containers")}
    print(", ".join(f"{'?' if n is None else n} {name}" for name, n in counts.items()))
    return DELIVERED


def _smoke(args: argparse.Namespace) -> int:
    with make_modal_executor(args.url, queue_timeout=args.timeout) as executor:

        def answers(smoke: Smoke) -> None:
            smoke.tell(f"the app answers: {_about(executor.health())}")

        def images(smoke: Smoke) -> None:
            job_id = smoke.images()
            smoke.results_of(executor.attach(job_id, timeout=args.timeout))
            smoke.tell("a job can be taken up again")

        def inputs(smoke: Smoke) -> None:
            template = WorkflowTemplate(_INPUT_TEMPLATE)
            pixel = InputImage(_PIXEL)
            run = executor.submit_workflow(
                template, [pixel], randomize_seed=False, timeout=args.timeout
            )
            smoke.results_of(run)
            smoke.tell("an input image arrives")

        def cancelling(smoke: Smoke) -> None:
            from comfy_executors.clients.modal import ModalClient
            from comfy_executors.clients.modal_answers import CANCELLED, DONE

            with contextlib.closing(ModalClient(args.url)) as client:
                smoke.cancelling(partial(_states, client), {CANCELLED}, DONE)

        return Smoke(executor, args.timeout).run(answers, images, inputs, cancelling)


def _states(client: ModalClient, job_id: str, waiter: Waiter) -> Iterator[str]:
    """Tell a job's state, whenever there is news of it, until it is final."""
    job = client.job(job_id, waiter)
    while not job.is_final:
        yield job.state
        job = client.poll({job_id: job.cursor}, _HOLD_SECONDS, waiter)[job_id]
    yield job.state


def _about(health: ModalHealth) -> str:
    words = f"version {health.version} on {health.backend}"
    if health.version != comfy_executors.__version__:
        words += f"; here is {comfy_executors.__version__}: deploy it again with this one"
    return words
