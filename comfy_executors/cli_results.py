"""`results.jsonl` of a sweep: one line a row, written when the row has ended, for --resume.

A row's files come into a folder of their own below `.unfinished`. When the row has ended, its line
is written, and then its files move to where the line says: killed at any moment, a row has either
a line or no files, once `--resume` has moved what was still to move.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from comfy_executors.cli_delivery import UsageError
from comfy_executors.errors import OutputFileError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "results.jsonl"
_UNFINISHED = ".unfinished"

Record = dict[str, Any]


def digest(value: Any) -> str:
    """Make a short fingerprint of what JSON can say."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_ids(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Name each row by its content; equal rows are counted, so that each has its own name."""
    seen: Counter[str] = Counter()
    for row in rows:
        content = digest(row)
        seen[content] += 1
        yield f"{content}-{seen[content]}"


@dataclass
class Resumed:
    """What an earlier run left.

    Args:
        done: The rows that need not be run.
        images: How many images these have.
        failed: How many rows failed and are run again.
        gone: How many rows have a result, and are not among the rows any more.
    """

    done: set[int]
    images: int = 0
    failed: int = 0
    gone: int = 0


class Results:
    """The results of one sweep in its folder; only one process may have them open.

    Args:
        folder: Where the images go, too. It exists.
        digests: What must not change between a run and its resumption, as people call it, and the
            digest of each, such as `{"the template": …}`.

    Raises:
        UsageError: Another process has them open.
        OutputFileError: The folder cannot be read.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self._folder = folder
        self._digests = dict(digests)
        self.path = folder / FILE_NAME
        self._unfinished = folder / _UNFINISHED
        self._file: int | None = None
        self._is_ours = False  # whether nothing in `.unfinished` belongs to a line any more
        self._lock = _lock(folder)

    def exists(self) -> bool:
        """Tell whether an earlier run has left results."""
        return self.path.exists()

    def begin(self) -> None:
        """Begin anew: remove what a run left that was killed before its first row ended."""
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._is_ours = True

    def resume(self, ids: Iterable[str]) -> Resumed:
        """Take up what an earlier run has left: keep what is done, drop what failed.

        Args:
            ids: The names of the rows there are now, in order.

        Raises:
            UsageError: They belong to another template or other options, or are no results.
            OutputFileError: They cannot be read or written.
        """
        temporary = self._folder / f".{FILE_NAME}.new"
        try:
            resumed = self._take_up(ids, temporary)
            os.replace(temporary, self.path)
        except OSError as error:
            raise OutputFileError(f"cannot write {temporary}: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):  # where it could not be made, that has been told
                temporary.unlink(missing_ok=True)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._is_ours = True
        return resumed

    def _take_up(self, ids: Iterable[str], temporary: Path) -> Resumed:
        index_of = {row_id: index for index, row_id in enumerate(ids)}
        resumed = Resumed(set())
        kept = 0
        with temporary.open("w", encoding="utf-8", newline="\n") as new:
            for record in self.records():
                self._check_digests(record)
                self._move(record)
                index = index_of.pop(record["id"], None)
                if record["error"] is not None:
                    resumed.failed += index is not None
                    continue
                kept += 1
                if index is None:
                    resumed.gone += 1
                else:
                    resumed.done.add(index)
                    resumed.images += len(record["images"])
                new.write(json.dumps({**record, "row": index}) + "\n")
            new.flush()
            os.fsync(new.fileno())
        if kept and not resumed.done and not resumed.failed:
            raise UsageError(
                f"{self.path} has the results of other rows: is --vars the right file?"
            )
        return resumed

    def records(self) -> Iterator[Record]:
        """Read what is there; a line that was broken off at the end is left out.

        A last line that lacks but its end, as an editor leaves it, is whole.

        Raises:
            UsageError: A line is no result.
            OutputFileError: They cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                yield from self._records(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputFileError(f"cannot read {self.path}: {error.strerror}") from error

    def _records(self, file: IO[bytes]) -> Iterator[Record]:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                record["id"], record["error"], record["images"], record["outputs"]
            except (ValueError, TypeError, KeyError):
                if not line.endswith(b"\n"):
                    return
                raise UsageError(f"{self.path}, line {number}, is no result of a row") from None
            yield record

    def folder_of(self, row_id: str) -> Path:
        """Tell where a row's files go while it runs."""
        return self._unfinished / row_id

    def append(self, record: Record) -> None:
        """Write the line of a row that has ended, onto the disk, and put its files where it says.

        Args:
            record: Its `images` and `outputs` each have the `path` below the folder at which the
                file is to be, and lies already below `folder_of` the row.

        Raises:
            OutputFileError: It cannot be written, or a file not be moved.
        """
        self._is_ours = False
        try:
            self._write((json.dumps({**record, "digests": self._digests}) + "\n").encode())
        except OSError as error:
            raise OutputFileError(f"cannot write {self.path}: {error.strerror}") from error
        self._move(record)
        self._is_ours = True
        shutil.rmtree(self.folder_of(record["id"]), ignore_errors=True)

    def close(self) -> None:
        """Let others have them."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._is_ours:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, line: bytes) -> None:
        if self._file is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, flags, 0o666)
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def _move(self, record: Record) -> None:
        for entry in (*record["images"], *record["outputs"]):
            source = self.folder_of(record["id"]) / entry["path"]
            target = self._folder / entry["path"]
            try:
                if source.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(source, target)
            except OSError as error:
                raise OutputFileError(f"cannot save {target}: {error.strerror}") from error

    def _check_digests(self, record: Record) -> None:
        before = record.get("digests")
        if not isinstance(before, dict):
            raise UsageError(
                f"{self.path} does not say of which template and options its results are: begin "
                "anew in another --output"
            )
        names = {**self._digests, **before}
        changed = [name for name in names if before.get(name) != self._digests.get(name)]
        if changed:
            raise UsageError(
                f"{', '.join(changed)} changed since {self.path} was begun: --resume would mix two "
                "kinds of images; begin anew in another --output"
            )


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        directory = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputFileError(f"cannot read {folder}: {error.strerror}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(directory)
        raise UsageError(f"another process is at work in {folder}") from error
    return directory
