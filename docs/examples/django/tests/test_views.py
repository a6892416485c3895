"""The views, through Django's own client."""

import base64
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from django.test import Client
from pictures import comfy
from pictures.models import Job

HOSTILE = 'a "fox"\n</script><b>{{ 7 * 7 }}</b> \\ {% raw %}", "steps": 1, "'
WAITING = ["pending"] * 3
STOPPED = {"interrupted", "deleted"}
PNG = b"\x89PNG\r\n\x1a\n"


def lines_of(response):
    return [json.loads(line) for line in b"".join(response.streaming_content).splitlines()]


def wait_for_jobs():
    """Wait until the threads that write down the state of jobs have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("job "):
            thread.join(30)
            assert not thread.is_alive()


def texts(server):
    return [prompt.graph["6"]["inputs"]["text"] for prompt in server.prompts]


def test_one_image_and_its_seed(client, comfyui):
    response = client.post("/image", {"prompt": "a fox", "steps": 3, "seed": 7})
    assert response.status_code == 200
    assert response["Content-Type"] == "image/png"
    assert response["X-Seed"] == "7"
    assert response.content.startswith(PNG)
    comfyui.wait_for(lambda server: [p.status for p in server.prompts] == ["success"])


def test_text_stays_text_on_its_way_to_comfyui(client, comfyui):
    assert client.post("/image", {"prompt": HOSTILE, "steps": 3}).status_code == 200
    assert texts(comfyui) == [HOSTILE.strip()]
    assert comfyui.prompts[0].graph["3"]["inputs"]["steps"] == 3


def test_a_stream_has_a_line_for_each_image(client, comfyui):
    response = client.post("/stream", {"prompt": "a fox", "steps": 3, "num_samples": 5, "seed": 7})
    facts = [fact for fact in lines_of(response) if fact["kind"] != "progress"]
    assert [fact["kind"] for fact in facts] == ["image"] * 5 + ["end"]
    assert facts[-1]["images"] == 5
    assert sorted(fact["seed"] for fact in facts[:-1]) == [7, 8, 9, 10, 11]
    assert all(base64.b64decode(fact["data"]).startswith(PNG) for fact in facts[:-1])


def test_a_stream_that_nobody_began_to_read_is_cancelled_when_it_is_closed(
    client, comfy_dev_server_factory, settings
):
    server = comfy_dev_server_factory(step_seconds=1.0)
    settings.COMFY_SERVER = server.address
    response = client.post("/stream", {"prompt": "a fox", "steps": 50, "num_samples": 2})
    server.wait_for(lambda server: [p.status for p in server.prompts] == ["running", "pending"])
    response.close()
    server.wait_for(lambda server: {p.status for p in server.prompts} <= STOPPED)


@pytest.mark.django_db(transaction=True)
def test_a_job_is_answered_at_once_and_tells_its_state(client, comfyui):
    response = client.post("/jobs", {"prompt": "a fox", "steps": 3, "num_samples": 3, "seed": 7})
    assert response.status_code == 202
    assert response["Location"] == response.json()["status_url"]
    wait_for_jobs()
    told = client.get(response["Location"]).json()
    assert (told["state"], told["error"], told["num_samples"]) == ("done", "", 3)
    assert sorted(image["seed"] for image in told["images"]) == [7, 8, 9]
    files = [b"".join(client.get(image["url"]).streaming_content) for image in told["images"]]
    assert len(set(files)) == 3
    assert all(file.startswith(PNG) for file in files)


@pytest.mark.django_db(transaction=True)
def test_a_job_can_be_cancelled(client, comfy_dev_server_factory, settings, tmp_path):
    server = comfy_dev_server_factory(step_seconds=1.0)
    settings.COMFY_SERVER, settings.MEDIA_ROOT = server.address, tmp_path
    url = client.post("/jobs", {"prompt": "a fox", "steps": 50, "num_samples": 16})["Location"]
    # Four are at the server; the others have not been handed out.
    server.wait_for(lambda server: [p.status for p in server.prompts] == ["running", *WAITING])
    assert client.get(url).json()["state"] == "running"
    client.delete(url)
    wait_for_jobs()
    assert client.get(url).json()["state"] == "cancelled"
    server.wait_for(lambda server: {p.status for p in server.prompts} <= STOPPED)
    assert len(server.prompts) == 4


@pytest.mark.django_db(transaction=True)
def test_a_job_that_fails_says_so(client, comfyui, settings, tmp_path):
    broken = tmp_path / "broken.json.jinja"
    broken.write_text(
        '{"1": {"class_type": "BenchSampler", "inputs": {"seed": 0, "width": 64, "height": 64,'
        ' "batch_size": 1, "steps": {{ steps }}, "seconds": 0, "text": "{{ prompt }}",'
        ' "fail": "/srv/secret"}},'
        ' "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}}'
    )
    settings.COMFY_TEMPLATE = broken
    url = client.post("/jobs", {"prompt": "a fox", "steps": 3, "num_samples": 1})["Location"]
    wait_for_jobs()
    told = client.get(url).json()
    assert (told["state"], told["error"]) == ("failed", "The image server failed.")


@pytest.mark.django_db
def test_a_job_whose_process_died_is_lost(client):
    job = Job.objects.create(num_samples=1)
    Job.objects.update(heartbeat="2000-01-01T00:00Z")
    assert client.get(f"/jobs/{job.id}").json()["state"] == "lost"


@pytest.mark.django_db
def test_unknown_jobs_and_pictures_are_404(client):
    job = Job.objects.create(num_samples=1)
    assert client.get("/jobs/00000000-0000-0000-0000-000000000000").status_code == 404
    assert client.get(f"/jobs/{job.id}/pictures/1").status_code == 404


@pytest.mark.django_db
def test_a_picture_whose_file_is_gone_is_a_404(client, settings, tmp_path):
    settings.MEDIA_ROOT = tmp_path
    job = Job.objects.create(num_samples=1)
    picture = job.pictures.create(file="gone.png")
    assert client.get(f"/jobs/{job.id}/pictures/{picture.id}").status_code == 404


@pytest.mark.parametrize("url", ["/image", "/stream", "/jobs"])
def test_a_bad_form_is_a_400_and_sends_nothing(client, comfyui, url):
    response = client.post(url, {"prompt": "", "steps": 1000, "num_samples": 1})
    assert response.status_code == 400
    assert set(response.json()["errors"]) == {"prompt", "steps"}
    assert comfyui.prompts == []


@pytest.mark.parametrize(
    ("text", "logged"),
    [
        ('{"1": {"class_type": "EmptyImage", "inputs": {"color": {{ color }}}}}', "missing var"),
        ("[{{ prompt }}, {{ steps }}]", "this is a list"),
    ],
)
def test_a_template_that_does_not_fit_is_our_fault(
    client, comfyui, settings, tmp_path, caplog, text, logged
):
    settings.COMFY_TEMPLATE = tmp_path / "other.json.jinja"
    settings.COMFY_TEMPLATE.write_text(text)
    response = client.post("/image", {"prompt": "a fox", "steps": 3})
    assert response.status_code == 500
    assert response.json() == {"error": "This site is not set up correctly."}
    assert logged in caplog.text
    assert comfyui.prompts == []


def test_a_model_that_is_missing_is_our_fault(client, comfy_dev_server_factory, settings, caplog):
    settings.COMFY_SERVER = comfy_dev_server_factory(checkpoints=["sd_xl_ours.safetensors"]).address
    response = client.post("/image", {"prompt": "a fox", "steps": 3})
    assert response.status_code == 500
    assert "sd_xl" not in response.content.decode()  # which models there are is for the log
    assert '"sd_xl_base_1.0.safetensors" is not on the server' in caplog.text


def test_a_value_that_is_refused_is_a_400_that_says_why(client, comfyui, settings, tmp_path):
    small = tmp_path / "small.json.jinja"
    text = settings.COMFY_TEMPLATE.read_text()
    small.write_text(text.replace('"width": 512', '"width": {{ steps }}'))
    settings.COMFY_TEMPLATE = small
    response = client.post("/image", {"prompt": "a fox", "steps": 3})
    assert response.status_code == 400
    assert "input width: 3 is below the minimum of 16" in response.json()["error"]


@pytest.mark.parametrize("text", [None, "{% if %}"])
def test_a_missing_or_broken_template_is_told_at_the_start(tmp_path, text):
    path = tmp_path / "other.json.jinja"
    if text is not None:
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "manage.py", "check"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "COMFY_TEMPLATE": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ImproperlyConfigured: COMFY_TEMPLATE: " in done.stderr
    assert str(path) in done.stderr


def test_a_server_that_is_down_is_a_503(client, settings, caplog):
    settings.COMFY_SERVER = "127.0.0.1:1"
    response = client.post("/image", {"prompt": "a fox", "steps": 3})
    assert response.status_code == 503
    assert response["Retry-After"] == "10"
    assert "127.0.0.1" not in response.content.decode()  # where it is, is for the log
    assert "127.0.0.1:1 cannot be reached" in caplog.text


def test_in_a_stream_an_error_is_a_line(client, settings):
    settings.COMFY_SERVER = "127.0.0.1:1"
    response = client.post("/stream", {"prompt": "a fox", "steps": 3, "num_samples": 2})
    facts = [fact for fact in lines_of(response) if fact["kind"] != "progress"]
    assert facts == [
        {"kind": "error", "status": 503, "error": "The image server does not answer."},
        {"kind": "end", "images": 0},
    ]


def test_a_server_that_wants_a_key_is_a_502(client, comfy_dev_server_factory, settings):
    settings.COMFY_SERVER = comfy_dev_server_factory(headers={"X-Key": "1"}).address
    assert client.post("/image", {"prompt": "a fox", "steps": 3}).status_code == 502


def test_what_takes_too_long_is_a_504(client, comfy_dev_server_factory, settings):
    server = comfy_dev_server_factory(step_seconds=1.0)
    settings.COMFY_SERVER, settings.COMFY_TIMEOUT = server.address, 0.5
    assert client.post("/image", {"prompt": "a fox", "steps": 50}).status_code == 504
    server.wait_for(lambda server: [p.status for p in server.prompts] == ["interrupted"])


def test_after_close_requests_are_answered_with_503(client, comfyui):
    assert client.post("/image", {"prompt": "a fox", "steps": 3}).status_code == 200
    comfy.close()
    assert client.post("/image", {"prompt": "a fox", "steps": 3}).status_code == 503
    threads = [t.name for t in threading.enumerate() if "Executor" in t.name or "job" in t.name]
    assert threads == []


@pytest.mark.parametrize("url", ["/image", "/stream", "/jobs"])
def test_without_a_csrf_token_nothing_is_made(comfyui, url):
    client = Client(enforce_csrf_checks=True)
    data = {"prompt": "a fox", "steps": 3, "num_samples": 1}
    assert client.post(url, data).status_code == 403
    assert client.get(url).status_code == 405
    assert comfyui.prompts == []


def test_the_page_brings_the_token(comfyui):
    client = Client(enforce_csrf_checks=True)
    page = client.get("/")
    data = {"prompt": "a fox", "steps": 3, "csrfmiddlewaretoken": str(page.context["csrf_token"])}
    assert client.post("/image", data).status_code == 200
