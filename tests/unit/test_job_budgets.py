"""The two budgets of a job, and when its queue is explained."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_executors.errors import JobTimeoutError
from comfy_executors.executors import job_budgets
from comfy_executors.executors.job_budgets import JobBudgets, JobLimits


class Time:
    """A clock that moves when somebody moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Told:
    """Stands for a job's results: keeps what is told."""

    job_id = "job-7"
    unsettled = (3, 4)

    def __init__(self, time: Time) -> None:
        self.time = time
        self.explained: list[float] = []

    def tell(self, kind: str, number: int, message: str) -> None:
        assert (kind, number, message) == ("waiting", 3, "no GPU")
        self.explained.append(self.time.now - 1000.0)


class Watch:
    """Knows why the queue does not move, once it was asked."""

    words = ""

    def __init__(self, time: Time) -> None:
        self._time = time
        self.moved_at = float("-inf")
        self.given: list[float] = []

    def note_move(self) -> None:
        self.moved_at = self._time.now

    def explain(self, waiter: Any, seconds: float) -> str:
        self.given.append(seconds)
        self.words = "no GPU"
        return self.words


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(job_budgets, "time", made)
    return made


@pytest.fixture
def told(time: Time) -> Told:
    return Told(time)


def budgets_of(told: Any, watch: Any = None, **limits: Any) -> JobBudgets:
    watch = watch or Watch(told.time)
    control: Any = None
    return JobBudgets(control, told, watch, "https://x", JobLimits(**limits))


def test_each_change_begins_a_budget(time: Time, told: Told) -> None:
    budgets = budgets_of(told, queue_timeout=60, execution_timeout=20, overtime=30)
    time.now += 50
    budgets.see(in_queue=True)
    assert budgets.left() == 10
    budgets.see(in_queue=False)
    assert budgets.left() == 50
    time.now += 60
    assert budgets.left() == 0
    budgets.see(in_queue=True)  # its worker died, and it waits anew
    assert budgets.left() == 60


def test_a_job_that_begins_anew_has_its_time_anew(time: Time, told: Told) -> None:
    budgets = budgets_of(told, queue_timeout=60, execution_timeout=20)
    budgets.see(in_queue=False)
    time.now += 15
    budgets.see(in_queue=False, attempt=2)  # its container was taken away
    assert budgets.left() == 20
    time.now += 15
    for attempt in (1, 2):  # late news, and more of the same
        budgets.see(in_queue=False, attempt=attempt)
    assert budgets.left() == 5


def test_a_queue_is_explained_every_fifteen_seconds(time: Time, told: Told) -> None:
    budgets = budgets_of(told, queue_timeout=100, execution_timeout=20)
    for _ in range(80):
        budgets.keep()
        time.now += 1
    assert told.explained == [30, 45, 60, 75]
    budgets.see(in_queue=False)
    assert budgets.until_explanation() == float("inf")


def test_a_job_whose_worker_died_is_explained_as_soon_as_the_first_time(
    time: Time, told: Told
) -> None:
    budgets = budgets_of(told, queue_timeout=300, execution_timeout=20)
    for in_queue, seconds in ((True, 61), (False, 1), (True, 31)):
        budgets.see(in_queue)
        for _ in range(seconds):
            budgets.keep()
            time.now += 1
    assert told.explained == [30, 45, 60, 62 + 30]


def test_a_queue_that_moves_is_waited_for(time: Time, told: Told) -> None:
    """As long as the jobs before it begin and end, it is only a matter of its turn."""
    watch = Watch(time)
    waiting, other = (budgets_of(told, watch, queue_timeout=20, execution_timeout=50) for _ in "ab")
    time.now += 15
    other.see(in_queue=False)
    assert waiting.left() == 20
    time.now += 15
    assert waiting.left() == 5
    other.end()
    assert waiting.left() == 20
    time.now += 20
    with pytest.raises(JobTimeoutError, match="waited 20 s for a worker"):
        waiting.keep()


def test_a_job_that_leaves_the_queue_unstarted_moves_nothing(time: Time, told: Told) -> None:
    watch = Watch(time)
    waiting, other = (budgets_of(told, watch, queue_timeout=20, execution_timeout=50) for _ in "ab")
    time.now += 15
    other.end()
    assert waiting.left() == 5


@pytest.mark.parametrize("in_queue", [True, False])
def test_a_budget_that_is_used_up(time: Time, told: Told, in_queue: bool) -> None:
    budgets = budgets_of(told, queue_timeout=20, execution_timeout=20)
    budgets.see(in_queue)
    time.now += 19
    budgets.keep()
    time.now += 1
    hint = "execution timeout of 20 s: .* execution_timeout=.* batches_per_job="
    words = "waited 20 s for a worker: no GPU" if in_queue else hint
    with pytest.raises(JobTimeoutError, match=words) as caught:
        budgets.keep()
    assert (caught.value.started, caught.value.job_id) == (not in_queue, "job-7")


def test_an_explanation_gets_no_more_time_than_the_budget_leaves(time: Time, told: Told) -> None:
    watch = Watch(time)
    budgets = budgets_of(told, watch, queue_timeout=46, execution_timeout=20)
    for passed in (10, 13, 7, 14):
        time.now += passed
        budgets.keep()
    assert watch.given == [3, 2]  # after 23 seconds, half of it, and after 44
    time.now += 2
    with pytest.raises(JobTimeoutError, match="46 s for a worker: no GPU"):
        budgets.keep()
    assert watch.given == [3, 2]  # at the timeout nobody is asked any more


def test_a_queue_that_nobody_asked_about_is_asked_about_for_a_second(
    time: Time, told: Told
) -> None:
    watch = Watch(time)
    budgets = budgets_of(told, watch, queue_timeout=5, execution_timeout=20)
    time.now += 5
    with pytest.raises(JobTimeoutError, match="5 s for a worker: no GPU"):
        budgets.keep()
    assert watch.given == [1]
