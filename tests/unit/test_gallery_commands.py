"""The command that makes a batch again: what a shell makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from comfy_executors.gallery.commands import batch_options, shell_command, variable_options

NO_NUL = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
SHELLS = [shell for shell in ("bash", "zsh", "ksh") if shutil.which(shell)]


def split_by(shell: str, command: str) -> list[str]:
    printed = subprocess.run(
        [shell, "-c", f"printf '%s\\0' {command}"], stdout=subprocess.PIPE, check=True
    ).stdout
    return printed.decode("utf-8", "surrogateescape").split("\0")[:-1]


@pytest.mark.parametrize("shell", SHELLS)
@given(arguments=st.lists(NO_NUL, min_size=1, max_size=4))
@example(arguments=["it's", "\x1b[201~rm -rf /\n", "\u202e'\\1", "\x03" + "7", "$(id) `id` !!"])
@example(arguments=["", "\r", "\t", "\\", "'", "\x85", "\udc80\udcff"])
@settings(max_examples=50, deadline=None)
def test_a_shell_hands_over_what_was_meant(shell: str, arguments: list[str]) -> None:
    command = shell_command(arguments)
    assert split_by(shell, command) == arguments
    # Nothing that a terminal would act on, and nothing that reads otherwise than it runs.
    assert not any(ord(letter) < 32 and letter != "\n" for letter in command)
    assert not set("\x7f\x1b\x9b\u202a\u202e\u2066") & set(command)


def test_ordinary_text_stays_readable() -> None:
    command = shell_command(["comfy-executors", "--var", "prompt=a \U0001f98a, it's\nred"])
    assert command == "comfy-executors --var 'prompt=a \U0001f98a, it'\"'\"'s\nred'"


def test_variables_and_batches_become_options() -> None:
    variables = {"a": "x=y", "b": 1.5, "c": [None, True], "d": "1"}
    assert variable_options(variables) == [
        "--var", "a=x=y", "--var-json", "b=1.5", "--var-json", "c=[null, true]", "--var", "d=1",
    ]  # fmt: skip
    assert batch_options(7, 4) == ["--seed", "7", "--num-samples", "4", "--batch-size", "4"]
    assert batch_options(None, 1) == ["--num-samples", "1", "--batch-size", "1"]
    with pytest.raises(ValueError, match="JSON"):
        variable_options({"a": float("nan")})


@pytest.mark.parametrize("shell", SHELLS)
@given(text=st.text(st.characters(), max_size=30))
@example(text="\ud800 half a pair")
@example(text="a \0 b, it's\n\U0001f98a")
@example(text="\udc80")
@settings(max_examples=50, deadline=None)
def test_a_variable_arrives_whatever_its_text(shell: str, text: str) -> None:
    option, argument = split_by(shell, shell_command(variable_options({"prompt": text})))
    name, _, value = argument.partition("=")
    taken = json.loads(value) if option == "--var-json" else value
    assert (name, as_sent(taken)) == ("prompt", as_sent(text))


def as_sent(text: str) -> str:
    """Return a text as the server gets it; two halves of a pair that meet are one character."""
    made: str = json.loads(json.dumps(text))
    return made
