"""The site under gunicorn with its four processes: leaving clients, and stopping."""

import json
import signal

import pytest
from served import WORKERS, gunicorn

from comfy_executors.devserver import DevServer

SLOW = {"prompt": "a fox", "steps": 50, "num_samples": 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory, database):
    """The site, and a ComfyUI that takes 50 s for a picture: what ends sooner was cancelled."""
    folder = tmp_path_factory.mktemp("site")
    with DevServer(step_seconds=1.0) as comfyui, gunicorn(folder, comfyui, database) as site:
        yield site, comfyui


def statuses(server):
    return [prompt.status for prompt in server.prompts]


@pytest.mark.parametrize("path", ["/image", "/stream"])
def test_when_the_client_leaves_the_picture_is_not_made(served, path):
    site, comfyui = served
    comfyui.reset()
    connection = site.visitor().begin(path, SLOW)
    comfyui.wait_for(lambda server: statuses(server) == ["running"], 30)
    connection.close()
    comfyui.wait_for(lambda server: statuses(server) == ["interrupted"], 30)


def test_any_process_tells_the_state_of_a_job(served):
    site, comfyui = served
    comfyui.reset()
    url = site.url + site.visitor().post(f"{site.url}/jobs", SLOW, timeout=60).headers["Location"]
    comfyui.wait_for(lambda server: statuses(server) == ["running"], 30)
    # A new connection each time, which any of the four may take.
    assert {site.visitor().get(url, timeout=60).json()["state"] for _ in range(12)} == {"running"}
    site.visitor().delete(url, timeout=60)
    comfyui.wait_for(lambda server: statuses(server) == ["interrupted"], 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_cancels_jobs_and_leaves_no_thread(
    tmp_path, database, comfy_dev_server_factory, number
):
    comfyui = comfy_dev_server_factory(step_seconds=1.0)
    with gunicorn(tmp_path, comfyui, database) as site:
        visitor = site.visitor()
        visitor.post(f"{site.url}/jobs", SLOW, timeout=60).raise_for_status()
        comfyui.wait_for(lambda server: statuses(server) == ["running"], 30)
        visitor.close()  # at SIGTERM, idle connections are waited for
        assert site.stop(number) == 0
    comfyui.wait_for(lambda server: statuses(server) == ["interrupted"])
    threads = [json.loads(file.read_text()) for file in tmp_path.glob("*.threads")]
    assert len(threads) == WORKERS
    left = [name for names in threads for name in names if "Executor-" not in name]
    assert left == ["MainThread"] * WORKERS, threads
