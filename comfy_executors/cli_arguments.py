"""What is typed on the command line, turned into what the library takes."""

from __future__ import annotations

import argparse
import json
import os
import ssl
from pathlib import Path
from typing import Any

from comfy_executors.cli_delivery import OPTION_OF, UsageError
from comfy_executors.clients.comfyui import DEFAULT_PORT
from comfy_executors.errors import ComfyExecutorsError, ServerError
from comfy_executors.workflows import MAX_SEED, WorkflowTemplate

STEP_SECONDS = 0.05  # of the dev server: slow enough to watch


def _positive_int(text: str) -> int:
    return _whole_number(text, 1, None)


def _port_number(text: str) -> int:
    return _whole_number(text, 0, 65535)


def _seed_number(text: str) -> int:
    return _whole_number(text, 0, MAX_SEED)


def _whole_number(text: str, low: int, high: int | None) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if number < low or (high is not None and number > high):
        upto = "" if high is None else f" to {high}"
        raise argparse.ArgumentTypeError(f"must be a whole number from {low}{upto}, not {text!r}")
    return number


def _seconds(text: str) -> float:
    """Parse a length of time in seconds, above 0."""
    number = _seconds_from_0(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return number


def _seconds_from_0(text: str) -> float:
    """Parse a length of time in seconds, from 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    # Beyond this, threads cannot wait; it also leaves out `inf` and `nan`.
    if not 0 <= number < 1e7:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text!r}")
    return number


def _text_variable(text: str) -> tuple[str, Any]:
    """Parse `name=value`; the value is text as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"write name=value, not {text!r}")
    return name, value


def _json_variable(text: str) -> tuple[str, Any]:
    name, value = _text_variable(text)
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"the value of {name} is not JSON ({error}); text goes with --var {name}=…"
        ) from None


def _header(text: str) -> tuple[str, str]:
    """Parse `Name: value`; whatever is wrong with it, it may be a key and is not repeated."""
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError("write 'Name: value'")
    return name.strip(), value.strip()


def _headers(text: str) -> list[tuple[str, str]]:
    """Parse `Name: value`, or the lines of the file that `@FILE` names; others see arguments."""
    if not text.startswith("@"):
        return [_header(text)]
    lines = _read_lines(text[1:])
    try:
        return [_header(line) for line in lines if line.strip()]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} in each line of {text[1:]}") from None


class _HeaderAction(argparse.Action):
    """Collects headers, and which may be told again: the names of files, and of headers."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            headers = _headers(values)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        namespace.header = [*namespace.header, *headers]
        if values.startswith("@"):
            namespace.header_files = [*namespace.header_files, values[1:]]
        else:
            namespace.header_names = [*namespace.header_names, headers[0][0]]


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:  # without its words, which quote the file
        raise argparse.ArgumentTypeError(f"{path} is no UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot read {path}: {reason}") from None


def _ca_bundle(path: str) -> str:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise argparse.ArgumentTypeError(f"{path} holds no certificate in PEM") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot read {path}: {reason}") from None
    return path


def load_template(place: str) -> WorkflowTemplate:
    """Read the template that a path or an http(s) URL leads to.

    Raises:
        UsageError: There is no such file or page, or it cannot be read.
        ComfyExecutorsError: As `WorkflowTemplate` does.
    """
    if place.lower().startswith(("http://", "https://")):
        try:
            return WorkflowTemplate.from_url(place)
        except ServerError as error:
            # Not the server that was to run it: for the caller, a template that is not there.
            raise UsageError(f"cannot read the template: {error}") from error
    try:
        return WorkflowTemplate.from_file(place)
    except (OSError, ValueError) as error:
        # A TemplateError is a ValueError, too; a plain one is a NUL in the path.
        if isinstance(error, ComfyExecutorsError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the template {place}: {reason}") from error


def template_variables(args: argparse.Namespace) -> dict[str, Any]:
    """Collect `--var` and `--var-json`.

    Raises:
        UsageError: One is given twice, or is one that another option fills in.
    """
    variables: dict[str, Any] = {}
    for name, value in [*args.var, *args.var_json]:
        if name in OPTION_OF:
            raise UsageError(f"{name} is filled in by {OPTION_OF[name]}, not by --var")
        if name in variables:
            raise UsageError(f"the variable {name} is given twice")
        variables[name] = value
    return variables


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` and `check` share."""
    parser.set_defaults(header_files=[], header_names=[])
    parser.add_argument("template", metavar="TEMPLATE", help="a path, or an http(s) URL")
    add_server_arguments(
        parser,
        f"host:port or a URL; default: $COMFYUI_URL; for run, else localhost:{DEFAULT_PORT}",
    )
    _add_variables(parser)


def add_server_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    """Add how a server is reached."""
    parser.add_argument(
        "--server", metavar="ADDRESS", default=os.environ.get("COMFYUI_URL"), help=help
    )
    parser.add_argument(
        "--header",
        metavar="'NAME: VALUE'",
        action=_HeaderAction,
        default=[],
        help="sent with each request, such as a key; @FILE reads such lines from a file, so that "
        "no key is among the arguments; may be repeated",
    )
    certificates = parser.add_mutually_exclusive_group()
    certificates.add_argument(
        "--ca",
        dest="verify",
        metavar="FILE",
        type=_ca_bundle,
        default=True,
        help="the CA that signed the server's certificate, in PEM",
    )
    certificates.add_argument(
        "--insecure",
        dest="verify",
        action="store_false",
        help="do not check the server's certificate: anybody between may read and change all",
    )


def _add_variables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--var",
        metavar="NAME=TEXT",
        type=_text_variable,
        action="append",
        default=[],
        help="a variable of the template, as text; may be repeated",
    )
    parser.add_argument(
        "--var-json",
        metavar="NAME=JSON",
        type=_json_variable,
        action="append",
        default=[],
        help="a variable of the template, as JSON: a number, true, a list; may be repeated",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        action="append",
        default=[],
        help="an input image, for templates that use input_images; may be repeated",
    )
    parser.add_argument(
        "--include-previews", action="store_true", help="take what PreviewImage nodes make, too"
    )
    parser.add_argument(
        "--json", action="store_true", help="write one JSON object a line to stdout"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only `run` takes."""
    parser.add_argument(
        "--num-samples", metavar="N", type=_positive_int, default=1, help="default: 1"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive_int,
        default=1,
        help="images made at once, for templates that use batch_size; default: 1",
    )
    parser.add_argument(
        "--seed", metavar="N", type=_seed_number, help="batch i uses seed N + i; default: random"
    )
    parser.add_argument("--output", metavar="DIR", default="out", help="default: %(default)s")
    parser.add_argument(
        "--ordered", action="store_true", help="tell the batches in order, not as they complete"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="for the whole run; then the rest fails"
    )
    parser.add_argument(
        "--batch-timeout", metavar="SECONDS", type=_seconds, help="for the execution of one batch"
    )
    parser.add_argument(
        "--max-workers",
        metavar="N",
        type=_positive_int,
        default=4,
        help="batches kept at the server at once; default: %(default)s",
    )
    parser.add_argument(
        "--batches-per-job",
        metavar="N",
        type=_positive_int,
        help="for --runpod and --modal: spread the run over jobs of N batches; default: one job",
    )
    parser.add_argument(
        "--ignore-errors", action="store_true", help="go on with the others when a batch fails"
    )
    parser.add_argument("--quiet", action="store_true", help="tell nothing but errors on stderr")


def add_listening_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add what says where to listen."""
    parser.add_argument(
        "--port", type=_port_number, default=port, help="0 takes a free one; default: %(default)s"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help='print {"url": …} as the first line')


def add_devserver_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `devserver` takes."""
    add_listening_arguments(parser, DEFAULT_PORT)
    parser.add_argument(
        "--step-seconds",
        metavar="SECONDS",
        type=_seconds_from_0,
        default=STEP_SECONDS,
        help="how long a sampling step takes; default: %(default)s",
    )
