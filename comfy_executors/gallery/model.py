"""What a gallery knows of its runs; it stands in the page as JSON, where the next run finds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_EXACT = 2**53  # browsers round whole numbers beyond it


@dataclass
class File:
    """One file of a batch.

    Args:
        path: Where it is, below the gallery's folder, with slashes.
        kind: image, video, audio, text, 3d or file.
        size: Its size in bytes.
        node: The node that made it, as people know it.
        text: The beginning of a text.
    """

    path: str
    kind: str
    size: int = 0
    node: str = ""
    text: str = ""


@dataclass
class Batch:
    """One batch, or one row's batch.

    Args:
        index: Which batch of its run, or of its row, from 0.
        row: Which row of a sweep, from 0.
        seed: Its seed.
        seconds: How long it took.
        variables: The variables that only its row has; what JSON does not have becomes text.
        command: What makes it again; empty where nothing can.
        error: Why it failed; empty where it did not.
        files: What it made, in order.
    """

    index: int
    row: int | None = None
    seed: int | None = None
    seconds: float | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    error: str = ""
    files: list[File] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.variables = _plain(self.variables)

    @property
    def name(self) -> str:
        """What people call it."""
        if self.row is None:
            return f"Batch {self.index}"
        return f"Row {self.row}, batch {self.index}" if self.index else f"Row {self.row}"


@dataclass
class Run:
    """One run: a section of the gallery.

    Args:
        id: A run that comes again under its id takes the place of the one there.
        title: Its headline, such as the template's file name.
        started: When it was begun, for people to read.
        server: Where it ran, without keys.
        seconds: How long it took.
        variables: The variables of all its batches, as for a batch.
        note: What there is to say of its commands.
        batches: Its batches, in order; those that failed have an error and no files.
    """

    id: str
    title: str
    started: str
    server: str = ""
    seconds: float | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.variables = _plain(self.variables)

    @property
    def failures(self) -> list[Batch]:
        """The batches that failed."""
        return [batch for batch in self.batches if batch.error]


def _plain(value: Any) -> Any:
    """Make of a value what JSON and a browser have, else its text: it is only shown."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value)


def run_to_json(run: Run) -> dict[str, Any]:
    """Make of a run what stands in a page; seeds as text, because a browser rounds high ones."""
    data = asdict(run)
    for batch in data["batches"]:
        if batch["seed"] is not None:
            batch["seed"] = str(batch["seed"])
    return data


def run_from_json(data: dict[str, Any]) -> Run:
    """Make a run of what stands in a page.

    Raises:
        TypeError, KeyError, ValueError: It is none.
    """
    batches = []
    for batch in data["batches"]:
        seed = None if batch["seed"] is None else int(batch["seed"])
        files = [File(**file) for file in batch["files"]]
        batches.append(Batch(**{**batch, "seed": seed, "files": files}))
    return Run(**{**data, "batches": batches})
