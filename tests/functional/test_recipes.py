"""The programs of docs/examples run: Flask, Celery, a thread pool, asyncio and a notebook."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import requests
from werkzeug.serving import make_server

from comfy_executors.devserver import DevServer

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HOSTILE = 'a "fox"\n{{ 7 * 7 }}", "steps": 1, "'
PNG = b"\x89PNG\r\n\x1a\n"
STOPPED = {"interrupted", "deleted"}
UNDER_WAY = {"running", "pending"}
SECONDS = 60


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def slow_server() -> Iterator[DevServer]:
    """Takes 20 s for a picture: what ends sooner was cancelled."""
    with DevServer(step_seconds=1.0) as server:
        yield server


def statuses(server: DevServer) -> list[str]:
    return [prompt.status for prompt in server.prompts]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(name: str, folder: Path, server: DevServer) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        env={**os.environ, "COMFYUI_URL": server.address},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


# Flask.


@pytest.fixture
def flask_client(server: DevServer) -> Iterator[Any]:
    app = load("flask_app").create_app(server.address)
    yield app.test_client()
    app.extensions["comfy"].close(cancel=True)


def test_flask_answers_with_an_image(flask_client: Any, server: DevServer) -> None:
    answer = flask_client.post("/image", data={"prompt": HOSTILE})
    assert (answer.status_code, answer.mimetype) == (200, "image/png")
    assert answer.data.startswith(PNG)
    assert [prompt.graph["6"]["inputs"]["text"] for prompt in server.prompts] == [HOSTILE]


def test_flask_streams_images(flask_client: Any, server: DevServer) -> None:
    answer = flask_client.post("/stream", data={"prompt": "a fox", "number": "3"})
    images = [json.loads(line) for line in answer.data.splitlines()]
    assert len({image["seed"] for image in images}) == 3
    assert all(base64.b64decode(image["png"]).startswith(PNG) for image in images)
    server.wait_for(lambda server: statuses(server) == ["success"] * 3)


@pytest.mark.parametrize("number", ["0", "-3"])
def test_flask_streams_at_least_one_image(flask_client: Any, number: str) -> None:
    answer = flask_client.post("/stream", data={"prompt": "a fox", "number": number})
    assert (answer.status_code, len(answer.data.splitlines())) == (200, 1)


def test_flask_tells_errors_by_status(flask_client: Any, server: DevServer) -> None:
    server.faults.fail("GET", "/prompt", status=401)
    answer = flask_client.post("/image", data={"prompt": "a fox"})
    assert (answer.status_code, answer.json) == (502, {"error": "the images cannot be made"})
    assert flask_client.post("/image", data={}).status_code == 400
    assert flask_client.get("/image").status_code == 405


def test_flask_cancels_a_stream_whose_client_leaves() -> None:
    with DevServer(step_seconds=0.02) as server:  # 0.4 s for a picture
        app = load("flask_app").create_app(server.address)
        site = make_server("127.0.0.1", 0, app, threaded=True)
        thread = Thread(target=site.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{site.port}/stream"
        form = {"prompt": "a fox", "number": "16"}
        with requests.post(url, data=form, stream=True, timeout=SECONDS) as answer:
            assert json.loads(next(answer.iter_lines()))["seed"]
        server.wait_for(lambda server: not STOPPED.isdisjoint(statuses(server)), SECONDS)
        server.wait_for(lambda server: UNDER_WAY.isdisjoint(statuses(server)), SECONDS)
        site.shutdown()
        thread.join()
        site.server_close()
        app.extensions["comfy"].close()
        assert 1 <= statuses(server).count("success") < 16


# Celery.


def environment_of(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder), str(EXAMPLES)])
    return {**os.environ, "CELERY_SETTINGS": "settings_of_test", "PYTHONPATH": path}


@contextmanager
def celery_worker(
    folder: Path, server: DevServer
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a real worker with two forked children, its broker and results in files."""
    for name in ("queue", "processed", "control", "results"):
        (folder / name).mkdir()
    settings = f"""
broker_url = "filesystem://"
broker_transport_options = {{
    "data_folder_in": {str(folder / "queue")!r},
    "data_folder_out": {str(folder / "queue")!r},
    "control_folder": {str(folder / "control")!r},
}}
result_backend = "file://{folder / "results"}"
worker_prefetch_multiplier = 1
task_soft_time_limit = 300
"""
    (folder / "settings_of_test.py").write_text(settings, "utf-8")
    environment = {**environment_of(folder), "COMFYUI_URL": server.address}
    command = ["-m", "celery", "-A", "celery_tasks", "worker", "--concurrency=2", "--loglevel=INFO"]
    log = folder / "worker.log"
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=file, stderr=file
        )
    try:
        yield worker, log
    finally:
        worker.kill()
        worker.wait()


SEND = """
import json, sys
from celery_tasks import make_images

tasks = json.loads(sys.argv[2])
sent = [make_images.delay(prompt, number, sys.argv[1]) for prompt, number in tasks]
results = [result.get(timeout=50, propagate=False) for result in sent]
print(json.dumps([r if isinstance(r, list) else type(r).__name__ for r in results]))
"""


def send(folder: Path, *tasks: tuple[str, int]) -> list[Any]:
    """Send tasks as another process does, and return what came of them."""
    done = subprocess.run(
        [sys.executable, "-c", SEND, str(folder / "images"), json.dumps(tasks)],
        cwd=folder,
        env=environment_of(folder),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout)
    return results


@pytest.mark.slow
def test_celery_makes_images_in_forked_children(tmp_path: Path, server: DevServer) -> None:
    with celery_worker(tmp_path, server) as (worker, log):
        # A server that never answered is given up after three calls; then Celery tries it again.
        server.faults.reset_before("GET", "/prompt", times=3)
        results = send(tmp_path, ("a boat", 1))
        assert "Retry in" in log.read_text("utf-8")
        results += send(tmp_path, (HOSTILE, 2), ("an owl", 3), ("a cat", 1))
        worker.send_signal(signal.SIGTERM)  # a warm shutdown
        assert worker.wait(SECONDS) == 0, log.read_text("utf-8")
    assert [len(images) for images in results] == [1, 2, 3, 1]
    paths = [image["path"] for images in results for image in images]
    assert len(set(paths)) == 7
    assert all(Path(path).read_bytes().startswith(PNG) for path in paths)
    texts = [prompt.graph["6"]["inputs"]["text"] for prompt in server.prompts]
    assert sorted(texts) == sorted(["a boat", *[HOSTILE] * 2, *["an owl"] * 3, "a cat"])
    server.wait_for(lambda server: statuses(server) == ["success"] * 7)


REVOKE = """
import sys
from celery_tasks import make_images

task = make_images.delay("a fox", 2, sys.argv[1])
sys.stdin.readline()
task.revoke(terminate=True, signal="SIGUSR1")
"""


@pytest.mark.slow
def test_celery_cancels_a_task_that_is_revoked(tmp_path: Path, slow_server: DevServer) -> None:
    with celery_worker(tmp_path, slow_server):
        command = [sys.executable, "-c", REVOKE, str(tmp_path / "images")]
        sender = subprocess.Popen(
            command, cwd=tmp_path, env=environment_of(tmp_path), stdin=subprocess.PIPE
        )
        slow_server.wait_for(lambda server: statuses(server) == ["running", "pending"], SECONDS)
        sender.communicate(b"\n", timeout=SECONDS)
        slow_server.wait_for(lambda server: set(statuses(server)) <= STOPPED, SECONDS)


# Programs.


def test_a_thread_pool_shares_one_executor(tmp_path: Path, server: DevServer) -> None:
    done = run_program("thread_pool.py", tmp_path, server)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines())[0] == "a blue fox: out/01.png"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{number:02d}.png" for number in range(6)
    ]
    # One executor: one websocket and one client id for all threads.
    assert len({prompt.client_id for prompt in server.prompts}) == 1


def test_a_thread_pool_goes_on_after_a_failure(tmp_path: Path, server: DevServer) -> None:
    server.faults.fail("POST", "/prompt", status=400, body='{"error": {"type": "x"}}')
    done = run_program("thread_pool.py", tmp_path, server)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 5
    assert "the server refused the workflow" in done.stderr


def test_an_asyncio_program_makes_and_cancels(tmp_path: Path, server: DevServer) -> None:
    done = run_program("asyncio_program.py", tmp_path, server)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 foxes, 2 owls\na cat with seed ")
    assert len(list((tmp_path / "out" / "a fox").iterdir())) == 4
    assert len(list((tmp_path / "out" / "an owl").iterdir())) == 2
    server.wait_for(lambda server: UNDER_WAY.isdisjoint(statuses(server)))
    made = statuses(server).count("success")
    assert 7 <= made < 50, "the rest of the cats was cancelled"


# The notebook.


@pytest.mark.slow
def test_the_notebook_shows_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the import, which warns where this is not decided.
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    nbformat, nbclient = import_module("nbformat"), import_module("nbclient")

    shown = nbformat.read(EXAMPLES.parent / "notebook.ipynb", as_version=4)
    fresh = nbformat.read(EXAMPLES.parent / "notebook.ipynb", as_version=4)
    for cell in fresh.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    with DevServer() as server:
        monkeypatch.setenv("COMFYUI_URL", server.address)
        monkeypatch.chdir(tmp_path)
        nbclient.NotebookClient(fresh, timeout=SECONDS, kernel_name="python3").execute()
        server.wait_for(lambda server: statuses(server) == ["success"] * 10)
    assert [seen(cell) for cell in fresh.cells] == [seen(cell) for cell in shown.cells]


def seen(cell: Any) -> list[tuple[str, str]]:
    """Return what a person sees of a cell: text, and that there is a picture."""
    kinds = []
    for output in cell.get("outputs", ()):
        assert output.output_type != "error", output
        if output.output_type == "stream":
            kinds.append((output.name, output.text))
            continue
        data = {
            kind: "" if kind.startswith("image/") else output.data[kind] for kind in output.data
        }
        kinds.extend(sorted(data.items()))
    return kinds
