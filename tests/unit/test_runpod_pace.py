"""How a job on RunPod is asked for: holds and pauses that grow, credit for a burst."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from comfy_executors.executors import runpod_pace
from comfy_executors.executors.runpod_pace import Pace


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(runpod_pace, "time", made)
    return made


def polls(time: Time, pace: Pace, count: int, answer: Callable[[float], bool]) -> list[float]:
    """Poll so often and return when; `answer` lets the time of a poll pass and tells of news."""
    control: Any = time
    starts = []
    for _ in range(count):
        wait = pace.begin(control)
        starts.append(time.now)
        pace.end(answer(wait), control)
    return starts


def holding(time: Time, news: Iterable[bool] = ()) -> tuple[list[float], Callable[[float], bool]]:
    """Make an answer that is held to its end, and the list of for how long; it brings no news."""
    waits: list[float] = []
    told = iter(news)

    def held(wait: float) -> bool:
        waits.append(wait)
        time.now += wait
        return next(told, False)

    return waits, held


def nobody() -> bool:
    return False


def test_what_is_held_is_held_longer_and_longer(time: Time) -> None:
    waits, held = holding(time)
    polls(time, Pace(nobody), 5, held)
    assert waits == [2.0, 3.0, 4.5, 5.0, 5.0]
    assert sum(time.slept) == 0


def test_what_is_not_held_is_asked_for_less_and_less_with_jitter(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[tuple[float, float]] = []

    class Chance:
        @staticmethod
        def uniform(low: float, high: float) -> float:
            factors.append((low, high))
            return 1.0

    monkeypatch.setattr(runpod_pace, "random", Chance)
    polls(time, Pace(nobody), 8, lambda wait: False)
    assert time.slept == [0.5, 0.75, 1.125, 1.6875, 2.53125, 3.796875, 5.0, 5.0]
    assert factors == [(0.8, 1.2)] * 8


def test_news_begin_it_anew(time: Time) -> None:
    waits, held = holding(time, news=[False, False, True, False])
    polls(time, Pace(nobody), 4, held)
    assert waits == [2.0, 3.0, 4.5, 2.0]


def test_a_stream_of_news_is_asked_for_less_than_three_times_a_second(time: Time) -> None:
    starts = polls(time, Pace(nobody), 30, lambda wait: True)
    seconds = starts[-1] - starts[0]
    assert len(starts) / seconds < 2.8
    assert max(later - sooner for sooner, later in zip(starts, starts[1:])) <= 0.4 + 1e-9


def test_the_rest_of_a_burst_is_asked_for_at_once_after_a_quiet_time(time: Time) -> None:
    pace = Pace(nobody)
    polls(time, pace, 6, lambda wait: True)  # no credit is left
    time.now += 10.0
    starts = polls(time, pace, 3, lambda wait: True)
    gaps = [later - sooner for sooner, later in zip(starts, starts[1:])]
    assert gaps[0] == pytest.approx(0.03)
    assert gaps[1] > 0.3


def test_in_a_crowd_nobody_holds_a_poll_for_long(time: Time) -> None:
    waits, held = holding(time)
    polls(time, Pace(lambda: True), 10, held)
    assert waits == [1.0] * 10
    assert len([seconds for seconds in time.slept if seconds > 3.9]) >= 3
