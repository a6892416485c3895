"""Ctrl-C, the end of the interpreter, and forks: each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from core_backend import DEADLINE

HERE = Path(__file__).parent

START = """
import os, sys, threading
from core_backend import *
executor = GatedExecutor(max_workers=2)
run = executor.submit(6)
executor.wait_until("begin", 2)
"""

REPORT = """
print(len(run.errors), executor.count("begin"), executor.count("end"), len(threads_of(executor)))
"""

WAITS = {
    "iteration": "with executor:\n        print('ready', flush=True)\n        next(run)",
    "result": "with executor:\n        print('ready', flush=True)\n        run.result()",
    "close": "executor.close()",
    "exit": "with executor:\n        pass",
}

# Says when close() has come to its wait; before, Ctrl-C would hit the script and not close().
TELL = """
joining = executor._join
def join():
    executor._join = joining
    print('ready', flush=True)
    joining()
executor._join = join
"""


def python(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", script],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=DEADLINE)
    finally:
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("where", sorted(WAITS))
def test_ctrl_c_cancels_and_ends(where: str) -> None:
    waiting = f"try:\n    {WAITS[where]}\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    tell = TELL if where in ("close", "exit") else ""
    with python(START + tell + waiting + REPORT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = finish(process)
    assert out.splitlines() == ["interrupted", "6 2 2 0"]
    assert err == ""
    assert process.returncode == 0


def test_a_forgotten_executor_is_closed_at_the_end_with_a_warning() -> None:
    with python(START + "print('end of the script')") as process:
        out, err = finish(process)
    assert out == "end of the script\n"
    assert err == (
        "<GatedExecutor batch_size=1 max_workers=2 runs=1> was not closed: cancelling 1 "
        "unfinished runs; use it with `with`\n"
    )
    assert process.returncode == 0


def test_a_forgotten_idle_executor_ends_in_silence() -> None:
    with python(START + "executor.open_gates(6); run.result()") as process:
        assert finish(process) == ("", "")
    assert process.returncode == 0


def test_an_executor_that_failed_to_be_made_does_not_spoil_the_end() -> None:
    script = """
from comfy_executors import ComfyServerWorkflowExecutor
ComfyServerWorkflowExecutor("ftp://nowhere")
"""
    with python(script) as process:
        _, err = finish(process)
    assert err.splitlines()[-1].startswith("ValueError: ")
    assert err.count("Traceback") == 1
    assert process.returncode == 1


FORK = """
executor.open_gates(6)
images = run.result()
held = executor.submit(6, "held")
executor.wait_until("begin", 2, "held")
assert threads_of(executor)
child = os.fork()
if child == 0:
    answers = []
    for ask in (lambda: next(held), held.result, held.outputs, lambda: held.futures, run.result):
        try:
            answers.append(ask())
        except WorkflowError as error:
            answers.append(str(error))
    foreign = "this run belongs to the process that started it, not to its forked child"
    assert answers == [foreign] * 5, answers
    executor.open_gates(6, "child")
    more = executor.submit(6, "child")
    assert len(more.result(10)) == 6
    executor.close()
    assert not threads_of(executor)
    os._exit(executor.backend_reset)
_, status = os.waitpid(child, 0)
executor.open_gates(6, "held")
print(os.WEXITSTATUS(status), len(held.result(10)), executor.backend_reset)
executor.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("options", ["", ", ignore_errors=True"])
def test_an_executor_works_on_both_sides_of_a_fork(options: str) -> None:
    fork = FORK.replace('"held")', f'"held"{options})', 1)
    script = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"
    script += "from comfy_executors import WorkflowError" + START + fork
    with python(script) as process:
        assert finish(process) == ("1 6 0\n", "")


LOCKED_FORK = """
executor.open_gates(6)
run.result()
executor.open_gates(1, "other")
executor.submit(1, "other").result()
gc.collect()
assert run._held_by_executor() is None  # only the caller holds it any more
locked, go_on = threading.Event(), threading.Event()
def hold():
    with executor._lock:
        locked.set()
        go_on.wait()
threading.Thread(target=hold, daemon=True).start()
locked.wait()
child = os.fork()
if child == 0:
    try:
        run.result(0)
    except WorkflowError:
        executor.open_gates(1, "child")
        os._exit(len(executor.submit(1, "child").result(10)))
    os._exit(9)
print(os.WEXITSTATUS(os.waitpid(child, 0)[1]))
go_on.set()
executor.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_lock_that_was_held_at_the_fork_holds_nobody_in_the_child() -> None:
    script = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"
    script += "import gc; from comfy_executors import WorkflowError" + START + LOCKED_FORK
    with python(script) as process:
        assert finish(process) == ("1\n", "")
