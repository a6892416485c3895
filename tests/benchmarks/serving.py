"""The dev server in a process of its own, as a benchmark starts it and talks to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from comfy_executors.devserver import DevServer


class Helper:
    """A module of this package in a process of its own, told what to do line by line.

    Args:
        module: The module's name in this package.
        arguments: Its command line.

    `hello` is the first line that it prints.
    """

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self._read()

    def ask(self, line: str) -> str:
        """Send a line and return the one that answers it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a helper process ended with status {self._process.wait()}")
        return line.rstrip("\n")

    def __enter__(self) -> Helper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The end of its input tells it to end.
        with self._process:
            pass


def spans(server: Helper) -> list[tuple[float, float]]:
    """Return when each prompt of the server began and ended, in seconds, in this order.

    Raises:
        RuntimeError: A prompt did not succeed.
    """
    records = json.loads(server.ask("prompts"))
    if any(status != "success" for _, _, status in records):
        raise RuntimeError(f"prompts did not succeed: {records}")
    return sorted((started, ended) for started, ended, _ in records)


def main() -> None:
    """Serve until the input ends: `reset` forgets all prompts, `prompts` prints them."""
    with DevServer() as server:
        print(server.address, flush=True)
        for line in sys.stdin:
            answer: object = "done"
            if line.strip() == "reset":
                server.reset()
            else:
                # The record of a prompt is closed a moment after its last event was sent.
                server.wait_for(lambda s: all(p.ended is not None for p in s.prompts))
                answer = [(p.started, p.ended, p.status) for p in server.prompts]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
