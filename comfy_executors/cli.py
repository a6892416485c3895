"""The command line: `run`, `check`, `template`, `demo`, `devserver`, `runpod`, `modal`, `version`.

Exit codes: 0 all was delivered, 1 some batches failed, 2 wrong usage or template, 3 the server
cannot be used, 130 cancelled by Ctrl-C or SIGTERM, with our prompts taken off the server.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import comfy_executors
from comfy_executors.cli_arguments import (
    STEP_SECONDS,
    add_devserver_arguments,
    add_run_arguments,
    add_template_arguments,
    load_template,
    template_variables,
)
from comfy_executors.cli_check import check
from comfy_executors.cli_delivery import (
    CANCELLED,
    DELIVERED,
    FAILED,
    UNREACHABLE,
    USAGE,
    Delivery,
    UsageError,
    error_facts,
    error_text,
    json_line,
)
from comfy_executors.cli_gallery import RunGallery, add_gallery_argument
from comfy_executors.cli_modal import (
    add_modal_arguments,
    add_modal_commands,
    make_modal_executor,
)
from comfy_executors.cli_progress import make_display
from comfy_executors.cli_runpod import (
    add_runpod_arguments,
    add_runpod_commands,
    make_runpod_executor,
)
from comfy_executors.cli_sweep import add_sweep_arguments, run_sweep
from comfy_executors.cli_template import add_template_command, template
from comfy_executors.clients.comfyui import DEFAULT_PORT
from comfy_executors.errors import ComfyExecutorsError, ServerError, WorkflowError
from comfy_executors.executors.comfy_server import ComfyServerWorkflowExecutor

_DEMO_TEMPLATE = Path(__file__).with_name("demo") / "workflow.json.jinja"
_DEMO_PROMPT = "a red fox asleep in a snowy forest, morning light"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_NEXT = """
The images are in {folder}. They are placeholders: no model ran.

Next, with your own ComfyUI:
  1. Take a copy of this template:
       {template}
     or export a workflow of yours with Workflow > Export (API), and make a template of it:
       comfy-executors template export.json -o workflow.json.jinja
  2. comfy-executors check TEMPLATE --server localhost:{port} --var prompt='a fox'
  3. comfy-executors run TEMPLATE --server localhost:{port} --var prompt='a fox' --num-samples 4"""

if TYPE_CHECKING:
    from comfy_executors.executors.base import BaseWorkflowExecutor

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code; the module's docstring lists them.

    Raises:
        SystemExit: The arguments are wrong (code 2), or help was asked for (code 0).
    """
    parser = _parser()
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE
    args = parser.parse_args(arguments)
    if getattr(args, "verify", True) is False:
        # Whoever says --insecure knows, and need not read it again among the results.
        warnings.filterwarnings("ignore", "Unverified HTTPS request")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path that the terminal's encoding does not have must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _sigterm_as_ctrl_c():
            code = _run_command(args)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return CANCELLED
    except BrokenPipeError:
        _abandon_stdout()
        return FAILED
    except OSError as error:
        # Of the library's own files an OutputFileError would tell.
        if error.errno not in _FULL:
            raise
        _abandon_stdout()
        print(f"error: cannot write to stdout: {error.strerror}", file=sys.stderr)
        return FAILED


def _run_command(args: argparse.Namespace) -> int:
    try:
        code: int = args.command(args)
        return code
    except ComfyExecutorsError as error:
        if getattr(args, "json", False):
            print(json_line("error", **error_facts(error)), flush=True)
        print(f"error: {error_text(error)}", file=sys.stderr)
        return _exit_code(error)


def _exit_code(error: ComfyExecutorsError) -> int:
    if isinstance(error, ServerError):
        return UNREACHABLE
    return FAILED if isinstance(error, WorkflowError) else USAGE


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let `kill`, `timeout` and service managers end a run as cleanly as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _abandon_stdout() -> None:
    # The interpreter flushes it once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The commands.


def _run(args: argparse.Namespace) -> int:
    template = load_template(args.template)
    variables = template_variables(args)
    if args.resume and not args.vars:
        raise UsageError("--resume goes with --vars")
    gallery = RunGallery(args, template, variables) if args.gallery else None
    if args.vars:
        return run_sweep(args, template, variables, _make_executor, gallery)
    with make_display(args.num_samples, quiet=args.quiet) as display:
        if args.batch_size > 1 and "batch_size" not in template.variables:
            display.note(
                "warning: the template does not use {{ batch_size }}: --batch-size has no effect"
            )
        executor = _make_executor(args)
        delivery = Delivery(
            display,
            as_json=args.json,
            output=args.output,
            keep_going=args.ignore_errors,
            ordered=args.ordered,
            gallery=gallery,
        )
        return delivery.run(
            executor,
            template,
            args.num_samples,
            input_images=args.input,
            seed=args.seed,
            timeout=args.timeout,
            batch_timeout=args.batch_timeout,
            include_previews=args.include_previews,
            variables=variables,
        )


def _make_executor(args: argparse.Namespace) -> BaseWorkflowExecutor:
    if args.runpod and args.modal:
        raise UsageError("--runpod and --modal: a run goes to one of them")
    if args.modal:
        return make_modal_executor(
            args.modal,
            batch_size=args.batch_size,
            batches_per_job=args.batches_per_job,
            max_workers=args.max_workers,
        )
    if args.runpod:
        return make_runpod_executor(
            args.runpod,
            worker=args.worker,
            batch_size=args.batch_size,
            batches_per_job=args.batches_per_job,
            max_workers=args.max_workers,
        )
    try:
        return ComfyServerWorkflowExecutor(
            args.server or f"localhost:{DEFAULT_PORT}",
            batch_size=args.batch_size,
            max_workers=args.max_workers,
            headers=dict(args.header),
            verify=args.verify,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _demo(args: argparse.Namespace) -> int:
    from comfy_executors.devserver import DevServer  # an extra, and slow to import

    samples = 16
    template = load_template(str(_DEMO_TEMPLATE))
    display = make_display(samples, quiet=False)
    with DevServer(step_seconds=STEP_SECONDS) as server, display:
        display.note(f"a dev server runs at {server.url}: 16 images in batches of 8")
        delivery = Delivery(
            display, as_json=False, output=args.output, keep_going=False, ordered=False
        )
        executor = ComfyServerWorkflowExecutor(server.address, batch_size=8)
        variables = {"prompt": _DEMO_PROMPT, "width": 512, "height": 512}
        code = delivery.run(executor, template, samples, variables=variables)
    if code == DELIVERED:
        folder = Path(args.output).resolve()
        display.note(_NEXT.format(folder=folder, template=_DEMO_TEMPLATE, port=DEFAULT_PORT))
    return code


def _devserver(args: argparse.Namespace) -> int:
    from comfy_executors.devserver import DevServer

    server = DevServer(args.port, args.host, step_seconds=args.step_seconds)
    try:
        server.start()
    except OSError as error:
        reason = error.strerror or str(error)
        # A port that is taken is worded by the server; a host name is the system's to complain of.
        known = args.host in reason
        raise UsageError(reason if known else f"no such host, {args.host}: {reason}") from error
    try:
        print(json.dumps({"url": server.url}) if args.json else server.url, flush=True)
        print("the dev server runs until Ctrl-C", file=sys.stderr)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass  # the ordinary end of a server
    finally:
        server.stop()
    return DELIVERED


def _version(args: argparse.Namespace) -> int:
    print(comfy_executors.__version__)
    return DELIVERED


# The arguments.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comfy-executors",
        description="Run ComfyUI workflow templates.",
        epilog="exit codes: 0 all delivered, 1 some batches failed, 2 wrong usage or template, "
        "3 the server cannot be used, 130 cancelled",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=comfy_executors.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = _add_command(commands, "run", _run, "run a template and save its images", "TEMPLATE ")
    add_template_arguments(run)
    add_run_arguments(run)
    add_sweep_arguments(run)
    add_gallery_argument(run)
    add_runpod_arguments(run)
    add_modal_arguments(run)

    words = "render a template and hold it against a server, without running it"
    add_template_arguments(_add_command(commands, "check", check, words, "TEMPLATE "))

    words = "make a template of a workflow that ComfyUI exported"
    add_template_command(_add_command(commands, "template", template, words, "EXPORT "))

    demo = _add_command(commands, "demo", _demo, "make 16 images on a dev server, without a GPU")
    demo.add_argument("--output", metavar="DIR", default="out", help="default: %(default)s")

    words = "serve a stand-in for ComfyUI until Ctrl-C"
    add_devserver_arguments(_add_command(commands, "devserver", _devserver, words))

    words = "look after a RunPod endpoint, with the key in $RUNPOD_API_KEY"
    runpod = commands.add_parser("runpod", help=words, description=words, allow_abbrev=False)
    add_runpod_commands(runpod)

    words = "look after an app on Modal, with the token in $MODAL_KEY and $MODAL_SECRET"
    modal = commands.add_parser("modal", help=words, description=words, allow_abbrev=False)
    add_modal_commands(modal)

    _add_command(commands, "version", _version, "print the version")
    return parser


def _add_command(
    commands: Commands,
    name: str,
    function: Callable[[argparse.Namespace], int],
    words: str,
    arguments: str = "",
) -> argparse.ArgumentParser:
    # All options in the usage would bury what an error says below it.
    usage = f"comfy-executors {name} {arguments}[--option …]"
    parser = commands.add_parser(
        name, help=words, description=words, usage=usage, allow_abbrev=False
    )
    parser.set_defaults(command=function)
    return parser
