"""Modal on the command line, on our app behind its edge, and on one that serves locally."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from modal_client_kit import Prompts, Site, client_of, document, finish, site, waiter
from server_kit import ENDLESS, PATIENCE, bench, bench_graph

from comfy_executors import ModalWorkflowExecutor, cli_smoke, workers
from comfy_executors.cli import main
from comfy_executors.executors import modal_job
from comfy_executors.testing import ModalEdge

__all__ = ["site"]


@pytest.fixture
def edge(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModalEdge]:
    monkeypatch.setenv("MODAL_KEY", str(site[1].key))
    monkeypatch.setenv("MODAL_SECRET", site[1].secret)
    yield site[1]
    site[1].clear()


Command = Callable[..., int]


@pytest.fixture
def command() -> Command:
    return lambda *arguments: main(arguments)


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "t.json").write_text(json.dumps(bench_graph()))
    return str(tmp_path / "t.json")


def test_run_on_modal(
    command: Command, edge: ModalEdge, template: str, tmp_path: Path, capfd: Any
) -> None:
    arguments = ("--num-samples", "3", "--batches-per-job", "2", "--output", str(tmp_path / "out"))
    assert command("run", template, "--modal", edge.url, *arguments) == 0
    assert sorted(capfd.readouterr().out.split()) == sorted(map(str, (tmp_path / "out").iterdir()))
    assert edge.calls["submit"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--modal", "http://me--app.modal.run"), "no https:// address"),
        (("--modal", "https://x.modal.run", "--runpod", "abc"), "a run goes to one of them"),
        (("--modal", "https://x.modal.run", "--batches-per-job", "0"), "whole number from 1"),
    ],
)
def test_wrong_usage(
    command: Command, template: str, arguments: tuple[str, ...], words: str, capfd: Any
) -> None:
    try:
        code: Any = command("run", template, *arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert words in capfd.readouterr().err


def test_health(command: Command, edge: ModalEdge, capfd: Any) -> None:
    assert command("modal", "health", edge.url, "--json") == 0
    health = json.loads(capfd.readouterr().out)
    assert (health["protocol"], health["backend"], health["containers"]) == (1, "local", 1)
    assert command("modal", "health", edge.url) == 0
    assert capfd.readouterr().out.splitlines()[1] == "0 queued, 0 running, 1 containers"


def test_smoke(command: Command, site: Site, edge: ModalEdge, capfd: Any) -> None:
    prompts = Prompts(site[0])
    assert command("modal", "smoke", edge.url) == 0
    lines = [line.split(" s  ")[1] for line in capfd.readouterr().out.splitlines()]
    assert lines[0].startswith("the app answers: version ")
    assert [line.split(" of job")[0] for line in lines[1:]] == [
        "batch 0", "batch 1", "batch 0", "batch 1", "a job can be taken up again",
        "batch 0", "an input image arrives", "a cancelled job stops: it is cancelled",
    ]  # fmt: skip
    prompts.idle()


class Stdout(io.StringIO):
    """Does something when certain words are printed, before the program goes on."""

    def __init__(self, words: str, action: Callable[[], object]) -> None:
        super().__init__()
        self._words = words
        self._action = action

    def write(self, text: str) -> int:
        if self._words in text:
            self._action()
        return super().write(text)


@pytest.mark.parametrize(("state", "most_polls"), [("done", 100), ("queued", 10)])
def test_smoke_asks_what_became_of_the_job_that_it_cancelled(
    command: Command, site: Site, edge: ModalEdge, monkeypatch: pytest.MonkeyPatch, capfd: Any,
    state: str, most_polls: int,
) -> None:  # fmt: skip
    prompts, client = Prompts(site[0]), client_of(edge)
    ahead: list[str] = []

    def keep_busy() -> None:
        ahead.append(client.submit(document(seconds=ENDLESS, steps=1000), waiter()).id)
        prompts.running()

    if state == "queued":
        monkeypatch.setattr(cli_smoke, "_STOP_SECONDS", 4.0)
        monkeypatch.setattr(sys, "stdout", Stdout("an input image arrives", keep_busy))
    agreed = '{"id": null}'  # and nothing is done
    edge.faults.fail("POST", "/v1/jobs/cancel", status=202, body=agreed, times=None)
    try:
        assert command("modal", "smoke", edge.url) == 1
        assert (edge.calls["cancel"], edge.calls["job"]) == (1, 2)
        assert edge.calls["poll"] <= most_polls
    finally:
        edge.clear()
        error = capfd.readouterr().err
        # The smoke's own job first, which waits behind the other.
        for job_id in [*re.findall(r"job (\S+): was cancelled", error), *ahead]:
            client.cancel(waiter(), job_id=job_id)
            finish(client, job_id)
        client.close()
        prompts.idle()
    assert ": was cancelled, and " in error
    assert f" s later is {state}" in error
    assert ("it ended before the cancelling came, or in spite of it" in error) is (state == "done")


def test_smoke_fails_with_the_reason(command: Command, edge: ModalEdge, capfd: Any) -> None:
    edge.faults.stop_app("POST", "/v1/jobs")
    assert command("modal", "smoke", edge.url) == 1
    assert "error: " in (told := capfd.readouterr()).err
    assert "the app is stopped" in told.err
    assert len(told.out.splitlines()) == 1


def test_a_wrong_token(
    command: Command, edge: ModalEdge, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("MODAL_SECRET", "ws-hush")
    assert command("modal", "health", edge.url) == 3
    shown = capfd.readouterr().err
    assert "the proxy token is wrong" in shown
    assert "hush" not in shown


def test_init_writes_the_app(command: Command, tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "my_app.py"
    assert command("modal", "init", str(path)) == 0
    assert path.read_bytes() == Path(workers.__file__).with_name("modal_app.py").read_bytes()
    assert f"modal deploy {path}" in capfd.readouterr().out
    path.write_text("mine")
    assert command("modal", "init", str(path)) == 2
    assert path.read_text() == "mine"
    assert "exists already" in capfd.readouterr().err


@pytest.fixture
def local(site: Site) -> Iterator[tuple[subprocess.Popen[str], str]]:
    arguments = ["modal", "serve-local", "--server", site[0].address, "--port", "0", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "comfy_executors", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def test_serve_local(
    site: Site, local: tuple[subprocess.Popen[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal_job, "_CANCEL_SECONDS", 0.2)  # nobody will be there to be told
    process, url = local
    prompts = Prompts(site[0])
    with ModalWorkflowExecutor(url) as executor:
        assert executor.health().backend == "local"
        assert len(executor.submit_workflow(bench(), num_samples=2).result(PATIENCE)) == 2
        slow = executor.submit_workflow(bench(ENDLESS, steps=1000))
        prompts.wait_for(lambda: prompts.statuses["running"] == 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        # What ran has been stopped.
        prompts.ended(success=2, interrupted=1)
        slow.cancel()


def test_smoke_on_a_local_app(
    command: Command, local: tuple[subprocess.Popen[str], str], capfd: Any
) -> None:
    assert command("modal", "smoke", local[1]) == 0
    assert capfd.readouterr().out.endswith("a cancelled job stops: it is cancelled\n")


def test_serve_local_on_a_port_that_is_taken(command: Command, site: Site, capfd: Any) -> None:
    port = str(site[0].port)
    assert command("modal", "serve-local", "--port", port) == 2
    assert "cannot listen at 127.0.0.1" in capfd.readouterr().err
