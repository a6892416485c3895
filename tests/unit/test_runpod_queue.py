"""What is said of a RunPod queue that does not move."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.clients.runpod_answers import JobCounts, RunPodHealth, WorkerCounts
from comfy_executors.errors import ServerResponseError, WorkflowCancelledError
from comfy_executors.executors import queue_watch
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.executors.runpod_queue import describe


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({"unhealthy": 2, "running": 1}, "2 workers are unhealthy: look at their logs on RunPod"),
        ({"running": 3}, "3 workers are busy: raise the endpoint's max workers, or wait"),
        ({"running": 1}, "1 worker is busy"),
        ({"initializing": 1}, "1 worker is starting: a cold start loads the image first"),
        ({"throttled": 2, "initializing": 1}, "1 worker is starting"),
        ({"throttled": 2}, "2 workers are throttled: RunPod has no free GPU of this kind"),
        ({"idle": 1}, "1 worker is idle and should take one soon"),
        ({"ready": 2, "idle": 1}, "2 workers are idle"),
        ({}, "there are no workers: is the endpoint's max workers above 0?"),
    ],
)
def test_each_kind_of_queue_has_its_words(workers: dict[str, int], words: str) -> None:
    text = describe(RunPodHealth(JobCounts(in_queue=4), WorkerCounts(**workers)))
    assert text.startswith("4 jobs wait, and ")
    assert words in text


def test_one_job_waits() -> None:
    text = describe(RunPodHealth(JobCounts(in_queue=1), WorkerCounts(running=1)))
    assert text.startswith("1 job waits, and 1 worker is busy")


class Time:
    """A clock that somebody moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Client:
    """Answers what it is told to."""

    url = "https://api.runpod.ai/v2/x"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def health(self, waiter: Any) -> RunPodHealth:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        found: RunPodHealth = answer
        return found


def health(**workers: int) -> RunPodHealth:
    return RunPodHealth(JobCounts(in_queue=1), WorkerCounts(**workers))


def watch(client: Any) -> QueueWatch:
    return QueueWatch(lambda waiter: describe(client.health(waiter)))


def test_the_endpoint_is_asked_every_fifteen_seconds_for_all_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time = Time()
    monkeypatch.setattr(queue_watch, "time", time)
    client = Client(health(throttled=1), health(initializing=1))
    told = watch(client)
    waiter = DeadlineWaiter(60.0)
    first = [told.explain(waiter, 3.0) for _ in range(3)]
    assert len(set(first)) == 1
    assert "throttled" in first[0]
    time.now += 15.0
    assert "starting" in told.explain(waiter, 3.0)
    assert client.answers == []


def test_an_endpoint_that_does_not_answer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr(queue_watch, "time", time)
    client = Client(health(throttled=1), ServerResponseError("no", "x", 502))
    told = watch(client)
    known = told.explain(DeadlineWaiter(60.0), 3.0)
    time.now += 15.0
    assert told.explain(DeadlineWaiter(60.0), 3.0) == known != ""
    assert told.words == known


def test_an_endpoint_that_does_not_answer_is_not_waited_for_long() -> None:
    limits = []

    def ask(waiter: Waiter) -> str:
        limits.append(waiter.limit(60.0))
        waiter.sleep(60.0)
        waiter.limit(60.0)
        raise AssertionError("the time is up")

    assert QueueWatch(ask).explain(DeadlineWaiter(60.0), 0.1) == ""
    assert limits[0] <= 0.1


def test_a_cancelled_job_does_not_wait_for_an_explanation() -> None:
    def ask(waiter: Waiter) -> str:
        waiter.limit(1.0)
        raise AssertionError("it was cancelled")

    class Cancelled(DeadlineWaiter):
        def limit(self, seconds: float) -> float:
            raise WorkflowCancelledError("the run was cancelled")

    with pytest.raises(WorkflowCancelledError):
        QueueWatch(ask).explain(Cancelled(60.0), 3.0)
