"""The table that the benchmarks print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One measurement.

    Args:
        what: What was measured.
        target: What it should be.
        measured: What it was.
        met: Whether that is so.
    """

    what: str
    target: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"{self.what:<68} {self.target:<9} {'met ' if self.met else 'MISS'} {self.measured}"
