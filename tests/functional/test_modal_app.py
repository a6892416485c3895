"""The app file under Modal's genuine SDK: it loads without an account, and its parts run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modal_kit import Caller, assemble
from server_kit import PATIENCE, free_port
from worker_kit import bench_document

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.testing import ModalEdge
from comfy_executors.workers.job_records import Envelope

pytest.importorskip("modal", reason="Modal's SDK needs Python 3.10")
pytest_plugins = ["modal_plane"]

# Each decorator is called as it is, and what it was given is printed.
_INSPECT = """
import json, sys, modal
given = []
def spy(owner, name):
    real = getattr(owner, name)
    def call(*args, **options):
        given.append([name, {k: v for k, v in options.items() if isinstance(v, (str, int, bool))}])
        return real(*args, **options)
    setattr(owner, name, call)
spy(modal, "asgi_app")
spy(modal, "concurrent")
spy(modal.App, "cls")
spy(modal.App, "function")
from comfy_executors.workers import modal_app
print(json.dumps([given, type(modal_app.web.local()).__name__, "fastapi" in sys.modules]))
"""


def loaded(**environment: str) -> Any:
    """Load the app file in a process without an account; what its decorators were given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MODAL_")}
    done = subprocess.run(
        [sys.executable, "-c", _INSPECT],
        env={**clean, "MODAL_CONFIG_PATH": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 2,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return json.loads(done.stdout)


def test_the_app_file_loads_without_an_account() -> None:
    given, kind, _ = loaded()
    assert kind == "FastAPI"
    cls = dict(given)["cls"]
    assert (cls["gpu"], cls["timeout"]) == ("L4", 3600)
    assert dict(given)["asgi_app"] == {"requires_proxy_auth": True}
    # On the class it would have Modal kill the container for one job that is cancelled.
    assert [options for name, options in given if name == "concurrent"] == [{"max_inputs": 100}]
    assert all("gpu" not in options for name, options in given if name == "function")


def test_settings_come_from_the_environment() -> None:
    given, _, _ = loaded(
        COMFY_MODAL_GPU="H100",
        COMFY_MODAL_TIMEOUT="600",
        COMFY_MODAL_SCALEDOWN_WINDOW="120",
        COMFY_MODAL_MAX_CONTAINERS="2",
        COMFY_MODAL_CUSTOM_NODES="comfyui-impact-pack@8.1, comfyui-kjnodes",
        COMFY_MODAL_REQUIRE_PROXY_AUTH="0",
    )
    cls = dict(given)["cls"]
    assert (cls["gpu"], cls["timeout"], cls["scaledown_window"]) == ("H100", 600, 120)
    assert cls["max_containers"] == 2
    assert dict(given)["asgi_app"] == {"requires_proxy_auth": False}


def test_deploying_stops_only_at_the_missing_account() -> None:
    """The file is imported first: what is wrong in it would be told instead."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MODAL_")}
    done = subprocess.run(
        [sys.executable, "-m", "modal", "deploy", "-m", "comfy_executors.workers.modal_app"],
        env={**clean, "MODAL_CONFIG_PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 2,
    )
    assert done.returncode == 1
    assert "Token missing" in done.stdout + done.stderr


# Its parts, in this process.


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def modal_app(monkeypatch: pytest.MonkeyPatch, server: DevServer) -> Any:
    from comfy_executors.workers import modal_app

    monkeypatch.setattr(modal_app, "COMFYUI_ADDRESS", server.address)
    return modal_app


def test_the_web_function_serves(modal_app: Any, server: DevServer) -> None:
    job = bench_document(2)
    with ModalEdge(modal_app.web.local()) as edge:
        app = Caller(edge.url, edge.key, edge.secret)
        last, events = app.finish(app.submit(job))
        assert all(app.output(event) for event in events if event["kind"] == "output")
    assert (last["state"], sorted(assemble(events, job).batches)) == ("done", [0, 1])
    assert len(server.prompts) == 2


@pytest.mark.filterwarnings("ignore:.*is executing locally.*:UserWarning")
def test_the_gpu_class_runs_a_job(modal_app: Any, places: Any, plane: Any) -> None:
    comfyui = modal_app.ComfyUI()
    job = bench_document(2)
    envelope = Envelope.decode(comfyui.run.local(wire.encode_document(job)))
    comfyui.container.close()
    assert envelope is not None
    assert envelope.state == "done"
    assert sorted(assemble(list(envelope.events), job).batches) == [0, 1]
    assert len(plane.files) == 2
    (told,) = plane.queues.values()
    assert told


_MAIN = """
import sys, threading
from comfy_executors.devserver import DevServer
assert "--extra-model-paths-config" in sys.argv and "--lowvram" in sys.argv
with DevServer(port=int(sys.argv[sys.argv.index("--port") + 1])):
    threading.Event().wait()
"""


@pytest.mark.filterwarnings("ignore:.*is executing locally.*:UserWarning")
def test_the_gpu_class_starts_comfyui_and_again_where_it_has_died(
    modal_app: Any,
    places: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "main.py").write_text(_MAIN)
    for name, value in (
        ("COMFYUI_ADDRESS", ""),
        ("COMFYUI_ARGUMENTS", "--lowvram"),
        ("_COMFYUI", tmp_path),
        ("_PORT", free_port()),
    ):
        monkeypatch.setattr(modal_app, name, value)
    comfyui = modal_app.ComfyUI()
    states = []
    for _ in range(2):
        returned = comfyui.run.local(wire.encode_document(bench_document(1)))
        states.append((returned["state"], [event["kind"] for event in returned["events"]][-1]))
        batches = [event for event in returned["events"] if event["kind"] == "batch"]
        assert len(batches) == 1
        process = comfyui.container._comfyui._process
        process.kill()
        process.wait()
    comfyui.container.close()
    assert states == [("done", "end")] * 2


def test_a_comfyui_that_does_not_start_is_no_timeout(
    modal_app: Any,
    places: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Raised by a container that starts, a TimeoutError would look like a job that goes on."""
    monkeypatch.setattr(modal_app, "COMFYUI_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(modal_app, "STARTUP_TIMEOUT", 0.2)
    with (
        pytest.raises(RuntimeError, match="ComfyUI did not start") as raised,
        pytest.warns(UserWarning, match="executing locally"),
    ):
        modal_app.ComfyUI().run.local({})
    assert not isinstance(raised.value, TimeoutError)


@pytest.mark.filterwarnings("ignore:.*is executing locally.*:UserWarning")
def test_old_files_are_cleaned_away(
    modal_app: Any,
    places: Any,
    plane: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plane.files = {"inputs/old": (b"x", 0.0), "outputs/fc-1/a.png": (b"x", 0.0)}
    modal_app.clean.local()
    assert plane.files == {}
    assert "2 old inputs and outputs removed" in capsys.readouterr().out
