"""Answers of /stream that are too large for memory: kept in a file, and read chunk by chunk.

RunPod hands out at once whatever a job has yielded since it was asked last. When the images are
taken slowly that can be most of a run.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

_READ_BYTES = 256 * 1024
_SPACE = " \t\r\n"
_AFTER_VALUE = _SPACE + ",:]}"
_decoder = json.JSONDecoder()


class ChunkFile:
    """The chunks of one answer in a file.

    Iterating reads them anew each time, and holds one of them in memory; only one iteration can go
    on at a time.

    Args:
        body: The file with the answer, at any position.

    Attributes:
        status: The job's status; empty when RunPod did not say.

    Raises:
        ValueError: It is no JSON, or no object with a list `stream`.
    """

    def __init__(self, body: IO[bytes]) -> None:
        self._body = body
        self.status = ""
        self._count = sum(1 for _ in self._read())

    def __iter__(self) -> Iterator[Any]:
        return self._read()

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Close the file."""
        self._body.close()

    def _read(self) -> Iterator[Any]:
        """Yield the chunks, and take down the status on the way."""
        text = _Text(self._body)
        text.expect("{")
        found = False
        more = text.peek() != "}"
        while more:
            name = text.value()
            text.expect(":")
            if name == "stream":
                found = True
                yield from _chunks(text)
            elif name == "status":
                self.status = str(text.value() or "")
            else:
                text.value()
            more = text.skip(",")
        text.expect("}")
        if not found:
            raise ValueError("the answer has no stream")


def _chunks(text: _Text) -> Iterator[Any]:
    text.expect("[")
    more = text.peek() != "]"
    while more:
        item = text.value()
        if isinstance(item, dict) and "output" in item:
            yield item["output"]
        more = text.skip(",")
    text.expect("]")


class _Text:
    """JSON that is read from a file, as much of it as is needed."""

    def __init__(self, body: IO[bytes]) -> None:
        body.seek(0)
        self._pieces = codecs.iterdecode(iter(partial(body.read, _READ_BYTES), b""), "utf-8")
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Return the next character that is no space; ValueError at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                raise ValueError("the answer was cut off")

    def skip(self, character: str) -> bool:
        """Skip a character if it comes next."""
        found = self.peek() == character
        self._at += found
        return found

    def expect(self, character: str) -> None:
        """Skip a character; ValueError if it does not come next."""
        if not self.skip(character):
            raise ValueError(f"the answer has {self.peek()!r} instead of {character!r}")

    def value(self) -> Any:
        """Read one value."""
        self.peek()
        while True:
            try:
                found, end = _decoder.raw_decode(self._text, self._at)
            except ValueError:
                if not self._fill():
                    raise
                continue
            # A number may go on in what was not read yet, also after its point: `1.` is read as 1.
            follows = self._text[end : end + 1]
            if (follows and follows in _AFTER_VALUE) or not self._fill():
                self._at = end
                return found

    def _fill(self) -> bool:
        piece = next(self._pieces, "")
        self._text = self._text[self._at :] + piece
        self._at = 0
        return bool(piece)
