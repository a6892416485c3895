"""Progress as people see it: on a terminal, in a log, in a notebook."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_kit import BENCH, PATIENCE, Cli, Terminal

from comfy_executors import ComfyServerWorkflowExecutor, ProgressEvent, WorkflowTemplate
from comfy_executors.devserver import DevServer
from comfy_executors.progress import ProgressBar, ProgressLines

SLOW = ("--var-json", "seconds=3600")


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def cli(tmp_path: Path, server: DevServer) -> Cli:
    server.reset()
    return Cli(tmp_path, server)


def step(batch: int, number: int, row: int | None = None) -> ProgressEvent:
    return ProgressEvent("step", batch, node="1", title="Noise", step=number, max=4, row=row)


# On a terminal


def test_a_bar_for_the_images_and_a_line_for_the_node(cli: Cli) -> None:
    arguments = ("run", "bench.jinja", "--num-samples", "3", "--batch-size", "2", *SLOW)
    with Terminal(cli, *arguments) as terminal:
        bar, node = terminal.wait_for(lambda lines: any("Noise" in line for line in lines))
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        lines = terminal.lines
    assert "0/3 [" in bar
    assert re.fullmatch("batch [01]: Noise", node)
    assert not any("Noise" in line for line in lines)
    assert "cancelling, on the server too …" in lines
    assert lines[-1].startswith("0 of 3 images in out after ")


def test_what_stays_on_the_screen(cli: Cli) -> None:
    with Terminal(cli, "run", "bench.jinja", "--num-samples", "4", "--batch-size", "2") as terminal:
        assert terminal.end() == 0
        *paths, bar, summary = terminal.lines
    assert sorted(paths) == [f"out/noise_0000{number}_.png" for number in (1, 2, 3, 4)]
    assert bar.startswith("100%|")
    assert "4/4 [" in bar
    assert summary.startswith("4 images in out after ")


def test_failures_are_counted_and_not_waited_for(cli: Cli) -> None:
    failing = ("--num-samples", "6", "--batch-size", "2", "--var", "fail=boom", "--ignore-errors")
    with Terminal(cli, "run", "bench.jinja", *failing) as terminal:
        assert terminal.end() == 1
        lines = terminal.lines
    assert any("0 images [" in line and "3 failed" in line for line in lines)
    assert lines[-1].startswith("0 of 6 images in out after ")


def test_a_batch_that_is_run_again_is_counted(cli: Cli) -> None:
    arguments = ("run", "bench.jinja", *SLOW)
    with Terminal(cli, *arguments) as terminal:
        terminal.wait_for(lambda lines: "batch 0: Noise" in lines)
        cli.server.restart()
        lines = terminal.wait_for(lambda lines: any("1 retried" in line for line in lines))
        cli.server.wait_for(lambda server: cli.statuses()["running"] == 1, PATIENCE)
        assert any(line.startswith("warning: batch 0 is run again: ") for line in lines)


def test_quiet_on_a_terminal(cli: Cli) -> None:
    with Terminal(cli, "run", "bench.jinja", "--quiet") as terminal:
        assert terminal.end() == 0
        assert terminal.lines == ["out/noise_00001_.png"]


def test_lines_on_a_terminal_without_tqdm(cli: Cli) -> None:
    cli.block("tqdm")
    arguments = ("run", "bench.jinja", "--num-samples", "2", "--var-json", "seconds=4")
    with Terminal(cli, *arguments) as terminal:
        lines = terminal.wait_for(lambda lines: bool(lines))
    assert re.fullmatch(r"0 of 2 images; batch [01]: Noise, step \d of 4", lines[0])


# The parts


def test_several_batches_share_the_line() -> None:
    log = io.StringIO()
    with ProgressLines(8, file=log, seconds=0) as progress:
        for event in (
            ProgressEvent("queued", 0),
            ProgressEvent("started", 0),
            ProgressEvent("started", 1),
            step(0, 2),
            step(1, 3),
            ProgressEvent("done", 0, step=4, max=4),
            ProgressEvent("retry", 1, message="lost"),
            ProgressEvent("started", 1),
            ProgressEvent("failed", 1, max=4, message="boom"),
        ):
            progress(event)
    lines = [line.partition(" images")[2] for line in log.getvalue().splitlines()]
    assert lines[:5] == [
        "",
        "; batch 0 begins",
        "; batch 0 begins · batch 1 begins",
        "; batch 0: Noise, step 2 of 4 · batch 1 begins",
        "; batch 0: Noise, step 2 of 4 · batch 1: Noise, step 3 of 4",
    ]
    assert lines[5:] == [
        ", about 0:00 left; batch 1: Noise, step 3 of 4",
        ", about 0:00 left, 1 retried",
        ", about 0:00 left, 1 retried; batch 1 begins",
        ", about 0:00 left, 1 retried, 1 failed",
    ]
    assert log.getvalue().splitlines()[-1].startswith("4 of 8 images")


def test_rows_are_told_apart() -> None:
    log = io.StringIO()
    with ProgressLines(file=log, seconds=0) as progress:
        progress(step(0, 1, row=7))
        progress(step(2, 2, row=8))
        progress(ProgressEvent("done", 0, step=1, max=1, row=7))
    assert log.getvalue().splitlines() == [
        "0 images; row 7: Noise, step 1 of 4",
        "0 images; row 7: Noise, step 1 of 4 · row 8, batch 2: Noise, step 2 of 4",
        "1 images; row 8, batch 2: Noise, step 2 of 4",
    ]


def test_lines_come_seldom() -> None:
    log = io.StringIO()
    with ProgressLines(1000, file=log, seconds=3600) as progress:
        for batch in range(1000):
            progress(ProgressEvent("done", batch, step=1, max=1))
    assert log.getvalue() == ""


def test_a_title_cannot_move_the_cursor() -> None:
    log = io.StringIO()
    with ProgressLines(file=log, seconds=0) as progress:
        progress(ProgressEvent("node", 0, node="1", title="a\x1b[2J\r\nb\u202e"))
    assert log.getvalue() == "0 images; batch 0: a [2J  b \n"


def test_a_bar_from_python(server: DevServer) -> None:
    server.reset()
    template = WorkflowTemplate(BENCH)
    drawn = io.StringIO()
    bar = ProgressBar(10, made=5, file=drawn)
    with ComfyServerWorkflowExecutor(server.address) as executor, bar:
        for _ in range(2):  # two runs share it
            executor.submit_workflow(template, num_samples=2, on_progress=bar).result()
    assert "9/10 [" in drawn.getvalue().rpartition("\r")[2]


@pytest.mark.slow
def test_a_notebook_gets_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # an older Jupyter warns without it
    import nbclient
    import nbformat

    code = (
        "from comfy_executors import ProgressEvent\n"
        "from comfy_executors.progress import ProgressBar\n"
        "with ProgressBar(2) as bar:\n"
        "    bar(ProgressEvent('done', 0, step=1, max=1))\n"
        "    bar(ProgressEvent('done', 1, step=1, max=1))\n"
    )
    cell: dict[str, Any] = {
        "cell_type": "code",
        "execution_count": None,
        "source": code,
        "metadata": {},
        "outputs": [],
    }
    book = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    notebook = nbformat.reads(json.dumps(book), as_version=4)  # type: ignore[no-untyped-call]
    nbclient.NotebookClient(notebook, timeout=int(PATIENCE)).execute()
    assert "application/vnd.jupyter.widget-view+json" in json.dumps(notebook.cells[0].outputs)
    assert "2/2" in json.dumps(notebook.metadata.widgets)


def test_without_tqdm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"comfy-executors\[cli\]"):
        ProgressBar(1)
