"""Jobs on RunPod that are cancelled at every moment of their lives: no prompt runs on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from runpod_worker import client_of, needs_sdk, waiter
from server_kit import PATIENCE, statuses
from worker_kit import bench_document

from comfy_executors import wire
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.devserver import DevServer
from comfy_executors.testing import RunPodStub, RunPodWorkerProcess
from comfy_executors.workers import runpod_stops
from comfy_executors.workers.runpod_handler import RunPodWorker
from comfy_executors.workers.runpod_stops import EarlyStops


@pytest.fixture
def site() -> Iterator[tuple[DevServer, RunPodStub]]:
    with DevServer() as server, RunPodStub() as stub:  # noqa: SIM117  too long for Python 3.9
        with RunPodWorkerProcess(stub, server.address) as worker:
            yield server, stub
            print(worker.log)  # shown when a test fails
            worker.kill()


def submit(client: RunPodClient, seconds: float) -> str:
    request = wire.encode_request(bench_document(2, seconds, steps=1000))
    return client.submit(request, execution_timeout=60, ttl=600, waiter=waiter()).id


# The job is queued; the SDK takes it; ComfyUI is asked, given a prompt, and runs it; the second
# waits there; and with each chunk that the handler sends.
MOMENTS = [
    "queued", *["taken"] * 5, "asked", *["chunks 1", "chunks 2", "chunks 3", "chunks 4"],
    "prompts 1", "running", "prompts 2",
]  # fmt: skip


def wait_for(moment: str, stub: RunPodStub, server: DevServer, before: int) -> None:
    """Wait for a moment of the newest job; `before` are the prompts of the others."""
    word, _, number = moment.partition(" ")
    count = int(number or 0)
    if word == "taken":
        stub.wait_for(lambda s: s.jobs[-1].status == "IN_PROGRESS", PATIENCE)
    elif word == "chunks":
        stub.wait_for(lambda s: s.jobs[-1].chunks >= count, PATIENCE)
    elif word == "asked":
        server.wait_for(lambda s: bool(s.requests), PATIENCE)
    elif word == "prompts":
        server.wait_for(lambda s: len(s.prompts) >= before + count, PATIENCE)
    elif word == "running":
        server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)


@needs_sdk
@pytest.mark.slow
def test_no_prompt_of_a_cancelled_job_runs_on(site: tuple[DevServer, RunPodStub]) -> None:
    server, stub = site
    client = client_of(stub)
    for moment in MOMENTS:
        # One worker: it begins a job when it has let go of the one before.
        before = len(server.prompts)
        job_id = submit(client, 4.0)
        wait_for(moment, stub, server, before)
        client.cancel(job_id, waiter())
    submit(client, 0.0)
    stub.wait_for(lambda s: s.jobs[-1].status == "COMPLETED", PATIENCE)
    client.close()
    ran_on = statuses(server)["success"] - 2  # of the last job
    assert (ran_on, statuses(server)["running"], statuses(server)["pending"]) == (0, 0, 0)
    found = Counter(job.status for job in stub.jobs)
    assert found == {"CANCELLED": len(MOMENTS), "COMPLETED": 1}


# The SDK's own loop, step by step.


class Loop:
    """The SDK's `JobScaler` with a handler of ours, and no platform.

    Args:
        stops: What keeps the stops that the SDK drops; None leaves the SDK as it is.
    """

    def __init__(self, stops: EarlyStops | None) -> None:
        class Scaler(import_module("runpod.serverless.modules.rp_scale").JobScaler):  # type: ignore[misc]
            pass

        if stops is not None:
            stops.watch(Scaler)
        self.ended: list[str] = []
        self.scaler = Scaler({"handler": None})
        self.scaler.jobs_handler = self._handle
        self._worker = RunPodWorker({}, {}, stops=stops)

    async def _handle(self, session: Any, config: Any, job: dict[str, Any]) -> None:
        async for _ in self._worker.handle(job):
            pass
        self.ended.append(job["id"])

    async def take(self, job_id: str) -> None:
        """Do what `get_jobs` does with a job that it was given."""
        taken = {"id": job_id, "input": {}}
        await self.scaler.jobs_queue.put(taken)
        self.scaler.job_progress.add(taken)

    async def work(self) -> list[str]:
        """Do what `run_jobs` does, to the end of what was taken; return what ended by itself."""
        running = asyncio.create_task(self.scaler.run_jobs(None))
        while self.scaler.current_occupancy():
            await asyncio.sleep(0)
        self.scaler.kill_worker()
        await running
        return self.ended


@pytest.fixture
def stops() -> EarlyStops:
    return EarlyStops()


@needs_sdk
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_stop_that_comes_before_its_job_begins_is_kept(stops: EarlyStops, is_taken: bool) -> None:
    async def play() -> list[str]:
        loop = Loop(stops)
        if is_taken:  # otherwise it is on its way
            await loop.take("early")
        assert not await loop.scaler.stop_job("early")
        if not is_taken:
            await loop.take("early")
        return await loop.work()

    assert asyncio.run(play()) == []


@needs_sdk
def test_a_stop_meets_its_own_job_only_and_once(stops: EarlyStops) -> None:
    async def play() -> list[str]:
        loop = Loop(stops)
        await loop.scaler.stop_job("early")
        await loop.take("other")
        await loop.work()
        ended = []
        for _ in range(2):  # the second time it is retried
            loop = Loop(stops)
            await loop.take("early")
            ended += await loop.work()
        return ended

    assert asyncio.run(play()) == ["early"]


@needs_sdk
def test_a_stop_in_the_moment_in_which_its_task_is_made_gives_the_place_back(
    stops: EarlyStops,
) -> None:
    async def play() -> None:
        loop = Loop(stops)
        await loop.take("newborn")
        running = asyncio.create_task(loop.scaler.run_jobs(None))
        while not loop.scaler.jobs_tasks:
            await asyncio.sleep(0)
        assert await loop.scaler.stop_job("newborn")
        while loop.scaler.current_occupancy():
            await asyncio.sleep(0)
        loop.scaler.kill_worker()
        await running
        assert loop.ended == []

    asyncio.run(asyncio.wait_for(play(), PATIENCE))


def test_an_old_stop_is_forgotten(stops: EarlyStops, monkeypatch: pytest.MonkeyPatch) -> None:
    stops.keep("old")
    monkeypatch.setattr(runpod_stops, "_KEPT_SECONDS", 0.0)
    assert not stops.take("old")
    stops.keep("newer")
    assert list(stops._missed) == ["newer"]


def test_an_sdk_without_stops_is_told_of(
    stops: EarlyStops, caplog: pytest.LogCaptureFixture
) -> None:
    stops.watch(type("JobScaler", (), {}))
    assert "install runpod 1.12" in caplog.text
