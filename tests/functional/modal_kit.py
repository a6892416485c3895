"""What the tests of the Modal app share: a client of its routes that is as plain as can be."""

from __future__ import annotations

import time
from typing import Any

import requests
from server_kit import PATIENCE, statuses
from worker_kit import Answer, put_together

from comfy_executors import wire
from comfy_executors.devserver import DevServer

FINAL = {"done", "failed", "cancelled", "unknown", "expired"}


class Caller:
    """Calls the routes of an app; follows redirects as requests does."""

    def __init__(self, url: str, key: str | None = None, secret: str | None = None) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        if key is not None:
            self.session.headers.update({"Modal-Key": key, "Modal-Secret": secret or ""})

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=PATIENCE, **options)

    def post(self, path: str, body: Any) -> requests.Response:
        return self.call("POST", path, json=body)

    def submit(self, document: wire.JobDocument) -> str:
        answer = self.post("/v1/jobs", wire.encode_document(document))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def poll(self, wait: float = 20.0, **cursors: str) -> dict[str, Any]:
        jobs = {name.replace("__", "-"): cursor for name, cursor in cursors.items()}
        return self.poll_jobs(jobs, wait)

    def poll_jobs(self, cursors: dict[str, str], wait: float = 20.0) -> dict[str, Any]:
        answer = self.post("/v1/jobs/poll", {"jobs": cursors, "wait": wait})
        assert answer.status_code == 200, answer.text
        jobs: dict[str, Any] = answer.json()["jobs"]
        return jobs

    def until(self, job_id: str, *kinds: str) -> list[dict[str, Any]]:
        """Follow a job to its first event of one of these kinds."""
        told: list[dict[str, Any]] = []
        cursor = ""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            job = self.poll_jobs({job_id: cursor})[job_id]
            cursor = job["cursor"]
            told += job["events"]
            if any(event["kind"] in kinds for event in told):
                return told
            assert job["state"] not in FINAL, job
        raise AssertionError(f"no {kinds} in {told}")

    def finish(self, job_id: str, cursor: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Follow a job to its end; its last object, and all events."""
        told: list[dict[str, Any]] = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            job = self.poll_jobs({job_id: cursor})[job_id]
            cursor = job["cursor"]
            told += job["events"]
            if job["state"] in FINAL:
                return job, told
        raise AssertionError(f"job {job_id} does not end: {told}")

    def output(self, event: dict[str, Any]) -> bytes:
        """Fetch an output and check it against its event."""
        answer = self.call("GET", event["url"])
        assert answer.status_code == 200, answer.text
        assert answer.headers["Content-Length"] == str(event["size"])
        assert answer.headers["ETag"] == f'"{event["sha256"]}"'
        return answer.content


def assemble(events: list[dict[str, Any]], document: wire.JobDocument) -> Answer:
    """Put a job's events of one attempt together; progress is left out where it was thinned."""
    attempts = {event["attempt"] for event in events}
    kept = [event for event in events if event["attempt"] == max(attempts)]
    told = [event for event in kept if event["kind"] != "progress"]
    numbered = [{**event, "seq": number} for number, event in enumerate(told)]
    return put_together(numbered, document)


def failure_of(answer: requests.Response | dict[str, Any]) -> Exception:
    """The exception of ours that an answer, or a job object, tells."""
    if isinstance(answer, dict):
        return wire.decode_error(answer["error"])
    return wire.decode_error(answer.json()["error"]["failure"])


def emptied(server: DevServer, success: int = 0) -> None:
    """Wait until ComfyUI has nothing left to do, and so many prompts went well.

    Whether the next one is taken out of the queue before or just after it began is chance.
    """
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)
    assert statuses(server)["success"] == success
