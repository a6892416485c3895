"""The command line as tests call it: in processes, in this process, and on a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

import pyte
import pytest

from comfy_executors.cli import main
from comfy_executors.devserver import DevServer

PATIENCE = 60.0
HOSTILE = 'a "fox"\\\n{{ 7 * 7 }} {% raw %} "}}, \u00e9 \U0001f98a </s> $(id)'
BENCH = """{
  "1": {"class_type": "BenchSampler", "_meta": {"title": "Noise"}, "inputs": {
    "seed": 1, "width": 16, "height": 16, "batch_size": {{ batch_size }}, "steps": 4,
    "seconds": {{ seconds | default(0) }}, "fail": "{{ fail | default('') }}",
    "text": "{{ prompt | default('') }}"}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "noise"}}
}"""


class Cli:
    """Runs `python -m comfy_executors` in a folder of its own."""

    def __init__(self, folder: Path, server: DevServer) -> None:
        self.folder = folder
        self.server = server
        (folder / "bench.jinja").write_text(BENCH, encoding="utf-8")
        self.environment = {**os.environ, "COMFYUI_URL": server.url, "PYTHONIOENCODING": "utf-8"}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, "-m", "comfy_executors", *arguments],
            cwd=self.folder,
            env=self.environment,
            encoding="utf-8",
            **options,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def with_files_below(self, size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it where no file can have more bytes than this, which is what a full disk is like."""
        code = (
            "import resource, sys\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
            "from comfy_executors.cli import main\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        return subprocess.run(
            [sys.executable, "-B", "-c", code, *arguments],
            cwd=self.folder,
            env=self.environment,
            encoding="utf-8",
            capture_output=True,
            timeout=PATIENCE,
        )

    def within(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it in this process, which is quicker, with this folder and environment."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            patch.delenv("COMFYUI_URL", raising=False)
            if "COMFYUI_URL" in self.environment:
                patch.setenv("COMFYUI_URL", self.environment["COMFYUI_URL"])
            try:
                code = main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def block(self, package: str) -> None:
        """Make a package look as if it were not installed."""
        stub = self.folder / "stubs" / package
        stub.mkdir(parents=True)
        (stub / "__init__.py").write_text(f"raise ImportError({package!r})\n", encoding="utf-8")
        self.environment["PYTHONPATH"] = str(stub.parent)

    def saved(self, output: str = "out") -> list[str]:
        return sorted(str(path) for path in (self.folder / output).glob("*.png"))

    def statuses(self) -> Counter[str]:
        return Counter(prompt.status for prompt in self.server.prompts)


def events(out: str) -> list[Any]:
    return [json.loads(line) for line in out.splitlines()]


class Terminal:
    """A terminal of 100 columns on which a command runs, and what a person sees on it.

    Args:
        cli: Starts the command.
        arguments: Its arguments.
    """

    def __init__(self, cli: Cli, *arguments: str) -> None:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self._leader = leader
        self._screen = pyte.Screen(100, 40)
        self._stream = pyte.ByteStream(self._screen)
        self.process = cli.start(*arguments, stdout=follower, stderr=follower)
        os.close(follower)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, without empty lines."""
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def wait_for(self, seen: Callable[[list[str]], bool]) -> list[str]:
        """Read what is written until the screen shows something; return its lines."""
        until = time.monotonic() + PATIENCE
        while not seen(self.lines):
            assert self._read(until), "\n".join(["never seen; the screen shows:", *self.lines])
        return self.lines

    def end(self) -> int:
        """Read until the command has ended, and return its exit code."""
        until = time.monotonic() + PATIENCE
        while self._read(until):
            pass
        return self.process.wait(PATIENCE)

    def _read(self, until: float) -> bool:
        if not select.select([self._leader], [], [], max(0.0, until - time.monotonic()))[0]:
            return False
        try:
            self._stream.feed(os.read(self._leader, 65536))
        except OSError:  # the other side is closed: the process has ended
            return False
        return True

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._leader)
