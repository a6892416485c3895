"""The rows of `run --vars`: a CSV or JSON Lines file, read once and before anything is sent."""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from comfy_executors.cli_delivery import OPTION_OF, UsageError
from comfy_executors.errors import OutputFileError
from comfy_executors.executors.sweep import ROW_ARGUMENTS
from comfy_executors.workflows import WorkflowTemplate

Row = dict[str, Any]

_CSV_SUFFIXES = (".csv", ".tsv")
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_NO = ("false", "no")
# Where a variable is a switch: a whole value outside quotes, or all that an `if` asks for.
_SWITCH = r'"\s*:\s*\{{\{{-?\s*{name}\s*(\||-?\}}\}})|\{{%-?\s*(el)?if\s+(not\s+)?{name}\s*-?%\}}'


@dataclass
class RowsSummary:
    """What a look at all rows told.

    Args:
        rows: How many there are.
        images: How many images they ask for.
        columns: All names in them.
        everywhere: The names that every row has.
        denied: For each CSV column in which a cell says no, such a cell.
    """

    rows: int = 0
    images: int = 0
    columns: set[str] = field(default_factory=set)
    everywhere: set[str] = field(default_factory=set)
    denied: dict[str, str] = field(default_factory=dict)


class RowsFile:
    """A file of rows, read once and kept as it is now: it may be edited while its rows are run.

    In CSV every value is text; JSON Lines keep their types.

    Args:
        path: A `.csv`, `.tsv`, `.jsonl` or `.ndjson` file in UTF-8, or a pipe of such a name.

    Raises:
        UsageError: Its name ends in nothing of these, it cannot be read, or something in it is no
            row.
        OutputFileError: There is no room for a copy.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in _CSV_SUFFIXES + _JSON_SUFFIXES:
            raise UsageError(f"--vars takes a .csv, .tsv, .jsonl or .ndjson file, not {path}")
        self._is_csv = suffix in _CSV_SUFFIXES
        self._delimiter = "\t" if suffix == ".tsv" else ","
        self.blank = 0  # rows without anything in them, which are left out
        self._copy = self._copied()  # a line of JSON for each row

    def __iter__(self) -> Iterator[Row]:
        """Read the rows from the copy; several may read at a time."""
        place = 0
        while True:
            self._copy.seek(place)
            line = self._copy.readline()
            if not line:
                return
            place = self._copy.tell()
            yield json.loads(line)

    def close(self) -> None:
        """Remove the copy."""
        self._copy.close()

    def _copied(self) -> IO[bytes]:
        try:
            with contextlib.ExitStack() as stack:
                copy = stack.enter_context(tempfile.TemporaryFile())
                for row in self._read():
                    copy.write(json.dumps(row).encode() + b"\n")
                copy.flush()
                stack.pop_all()
                return copy
        except OSError as error:
            raise OutputFileError(
                f"cannot make a temporary copy of {self.path}: {error.strerror}; "
                "$TMPDIR names another folder for it"
            ) from error

    def _read(self) -> Iterator[Row]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield from self._csv_rows(file) if self._is_csv else self._json_rows(file)
        except UnicodeDecodeError:
            kind = "CSV UTF-8" if self._is_csv else "UTF-8"
            raise UsageError(f"{self.path} is no UTF-8 text: save it as {kind}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot read {self.path}: {reason}") from error

    def summary(self, num_samples: int) -> RowsSummary:
        """Look at all rows.

        Args:
            num_samples: How many images a row asks for that does not say it.

        Raises:
            UsageError: There is no row.
        """
        summary = RowsSummary()
        for row in self:
            summary.everywhere = summary.everywhere & row.keys() if summary.rows else set(row)
            summary.columns |= row.keys()
            summary.rows += 1
            if self._is_csv:
                summary.denied.update(
                    (name, cell) for name, cell in row.items() if str(cell).lower() in _NO
                )
            number = row.get("num_samples", num_samples)
            summary.images += number if isinstance(number, int) and number > 0 else 0
        if not summary.rows:
            raise UsageError(f"there is no row in {self.path}")
        return summary

    def _csv_rows(self, file: IO[str]) -> Iterator[Row]:
        reader = csv.reader(file, delimiter=self._delimiter, strict=True)
        try:
            columns = next(reader, [])
            self._check_columns(columns)
            for cells in reader:
                if not cells:
                    continue
                # As spreadsheets leave them below a table. One column may well hold an empty text.
                if len(columns) > 1 and not any(cell.strip() for cell in cells):
                    self.blank += 1
                    continue
                if len(cells) != len(columns):
                    raise self._wrong(
                        reader.line_num, f"{len(cells)} values for {len(columns)} columns"
                    )
                yield _from_text(dict(zip(columns, cells)))
        except csv.Error as error:
            raise self._wrong(reader.line_num, str(error)) from error

    def _check_columns(self, columns: list[str]) -> None:
        if self._delimiter == "," and any(";" in name for name in columns):
            raise self._wrong(1, "the columns are separated by ;: save it with commas")
        if "" in columns:
            number = columns.index("") + 1
            raise self._wrong(1, f"column {number} has no name; is there a comma too many?")
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise UsageError(f"{self.path} has two columns {', '.join(twice)}")

    def _json_rows(self, file: IO[str]) -> Iterator[Row]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._wrong(number, f"no JSON: {error}") from error
            if not isinstance(row, dict):
                raise self._wrong(number, f"a row is a JSON object, not {type(row).__name__}")
            if isinstance(row.get("input_images"), str):
                row["input_images"] = [row["input_images"]]
            yield row

    def _wrong(self, line: int, reason: str) -> UsageError:
        return UsageError(f"{self.path}, line {line}: {reason}")


def _from_text(row: Row) -> Row:
    """Make of the cells that are no variables what they stand for; empty ones say nothing."""
    for name in ROW_ARGUMENTS:
        cell = row.pop(name, "")
        if not cell:
            continue
        row[name] = [cell] if name == "input_images" else cell
        if name != "input_images" and cell.strip().isdecimal():
            row[name] = int(cell)
    return row


def check_columns(
    rows: RowsFile, summary: RowsSummary, template: WorkflowTemplate, given: Collection[str]
) -> None:
    """Hold the names in the rows against the template.

    Args:
        rows: The file, for messages.
        summary: What is in it.
        template: The template.
        given: The variables that all rows get.

    Raises:
        UsageError: The template does not have one of them, or wants one that nobody gives.
    """
    variables = {name for name in template.variables if name not in OPTION_OF}
    known = sorted(variables | set(ROW_ARGUMENTS))
    unknown = sorted(summary.columns - set(known))
    for name in unknown:
        if name in OPTION_OF:
            raise UsageError(f"{rows.path}: {name} is filled in by {OPTION_OF[name]}, not by rows")
    stray = sorted(set(given) - template.variables)
    if stray:
        words = ", ".join(_with_nearest(name, known) for name in stray)
        raise UsageError(f"the template does not have what --var gives: {words}")
    if unknown:
        words = ", ".join(_with_nearest(name, known) for name in unknown)
        raise UsageError(
            f"{rows.path} has what the template does not: {words}; "
            f"the template has {', '.join(sorted(variables)) or 'no variables'}"
        )
    missing = sorted(template.required_variables - OPTION_OF.keys() - summary.columns - set(given))
    if missing:
        hint = " ".join(f"--var {name}=TEXT" for name in missing)
        raise UsageError(
            f"{rows.path} does not have {', '.join(missing)}, which the template wants; "
            f"for all rows: {hint}"
        )


def text_switches(summary: RowsSummary, template: WorkflowTemplate) -> list[str]:
    """Warn of cells that say no where the template has a switch: as a text they count as true.

    Args:
        summary: What is in the rows.
        template: The template.

    Returns:
        A warning for each such column.
    """
    return [
        f"warning: {cell} in the column {name} is a text, which counts as true: JSON Lines have "
        "true and false"
        for name, cell in sorted(summary.denied.items())
        if re.search(_SWITCH.format(name=re.escape(name)), template.text)
    ]


def _with_nearest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{name} (did you mean {nearest[0]}?)" if nearest else repr(name)
