"""The command that makes a batch again, quoted so that a shell hands over exactly what is meant."""

from __future__ import annotations

import json
import os
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Letters that turn the direction of writing: what is read would not be what is run.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shell_command(arguments: Sequence[str]) -> str:
    """Join arguments to one command for a POSIX shell.

    Args:
        arguments: The program and its arguments, with any text but NUL in them.

    Returns:
        The command. Control characters are written as escapes (`$'…'`, of bash, zsh and POSIX
        2024): pasted as they are, a terminal would act on them.
    """
    return " ".join(map(_quoted, arguments))


def _quoted(argument: str) -> str:
    if not any(map(_is_unsafe, argument)):
        return shlex.quote(argument)
    return "$'" + "".join(map(_escaped, argument)) + "'"


def _is_unsafe(letter: str) -> bool:
    if letter == "\n":
        return False
    return letter in _TURNING or unicodedata.category(letter) in ("Cc", "Cs")


def _escaped(letter: str) -> str:
    if letter in "'\\":
        return f"\\{letter}"
    if _is_unsafe(letter):
        # Octal has three digits, so that what follows is never taken for one more.
        return "".join(f"\\{byte:03o}" for byte in os.fsencode(letter))
    return letter


def variable_options(variables: Mapping[str, Any]) -> list[str]:
    """Write variables as options: text as `--var`, everything else as `--var-json`.

    So is text that no argument can hold, for a NUL or half a surrogate pair in it: JSON escapes
    these.

    Raises:
        TypeError, ValueError: JSON cannot express one.
    """
    options = []
    for name, value in variables.items():
        if isinstance(value, str) and not any(map(_needs_json, value)):
            options += ["--var", f"{name}={value}"]
        else:
            options += ["--var-json", f"{name}={json.dumps(value, allow_nan=False)}"]
    return options


def _needs_json(letter: str) -> bool:
    return letter == "\0" or unicodedata.category(letter) == "Cs"


def batch_options(seed: int | None, size: int, num_samples: int | None = None) -> list[str]:
    """Write how a batch is made again.

    Args:
        seed: Its seed.
        size: How many images it makes.
        num_samples: How many images the run makes; by default the batch is made alone.
    """
    options = [] if seed is None else ["--seed", str(seed)]
    return [*options, "--num-samples", str(num_samples or size), "--batch-size", str(size)]
