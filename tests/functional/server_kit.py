"""What the tests of the ComfyUI server executor share: graphs, a stranger, counts."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from typing import Any

import requests

from comfy_executors import WorkflowTemplate
from comfy_executors.devserver import DevServer

PATIENCE = 30.0  # seconds until a wait of a test gives up
ENDLESS = 3600.0  # seconds that a prompt runs which the test stops
VERSIONS = ("0.33.0", "0.8.0", "0.3.40")


def bench_graph(seconds: float = 0.0, **inputs: Any) -> dict[str, Any]:
    """Noise in so many seconds, saved."""
    sampler = {"seed": 1, "width": 16, "height": 16, "batch_size": 1, "steps": 4, "fail": ""}
    sampler.update({"seconds": seconds, "text": "x", **inputs})
    return {
        "1": {"class_type": "BenchSampler", "inputs": sampler, "_meta": {"title": "Sampler"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}},
    }


def bench(seconds: float = 0.0, **inputs: Any) -> WorkflowTemplate:
    return WorkflowTemplate.from_graph(bench_graph(seconds, **inputs))


def bench_but(seed: int, **inputs: Any) -> WorkflowTemplate:
    """`bench()`, with other inputs at one seed."""
    text = json.dumps(bench_graph(seed=-1)).replace("-1", "{{ seed }}")
    for name, value in inputs.items():
        plain = json.dumps(bench_graph()["1"]["inputs"][name])
        one = f'"{name}": {{{{ {json.dumps(value)} if seed == {seed} else {plain} }}}}'
        text = text.replace(f'"{name}": {plain}', one)
    return WorkflowTemplate(text)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def loading() -> WorkflowTemplate:
    """Loads the first input image and saves it."""
    return WorkflowTemplate(
        """{
        "1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}}
        }"""
    )


def stranger_posts(server: DevServer, seconds: float) -> str:
    """Post a prompt as another client does, and return its id."""
    body = {"prompt": bench_graph(seconds, steps=1000), "client_id": "stranger"}
    answer = requests.post(f"{server.url}/prompt", json=body, timeout=PATIENCE)
    return str(answer.json()["prompt_id"])


def statuses(server: DevServer) -> Counter[str]:
    return Counter(prompt.status for prompt in server.prompts)


def ended(server: DevServer, **expected: int) -> None:
    """Wait until the prompts, all of them, have ended so."""
    server.wait_for(lambda s: statuses(s) == expected, PATIENCE)


def status_of(server: DevServer, prompt_id: str) -> str:
    return next(prompt.status for prompt in server.prompts if prompt.prompt_id == prompt_id)


def served(server: DevServer) -> Counter[str]:
    """How many requests came for each route: `GET /history/*`."""
    return Counter(f"{request.method} {_route(request.path)}" for request in server.requests)


def threads_since(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads that began since, but for those that the servers' loops start."""
    loops = ("asyncio_", "uvloop_")
    now = {thread for thread in threading.enumerate() if not thread.name.startswith(loops)}
    return now - before


def _route(path: str) -> str:
    return "/history/*" if path.startswith("/history/") else path
