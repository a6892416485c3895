"""A client for the tests of the dev server, and the graphs that they send."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import requests
import websocket
from PIL import Image

from comfy_executors.devserver import DevServer

PATIENCE = 20.0
PROMPT_ID = "0b1f4a1e-9d7c-4a55-8f0e-6d2c3b4a5e6f"


@contextmanager
def dev_server(*args: Any, **options: Any) -> Iterator[DevServer]:
    """Run a server, and close the clients' websockets in the end."""
    try:
        with DevServer(*args, **options) as server:
            yield server
    finally:
        while Client.opened:
            Client.opened.pop().close(timeout=0)


class Client:
    """A websocket and the requests that go with it."""

    opened: ClassVar[list[websocket.WebSocket]] = []

    def __init__(
        self, server: DevServer, client_id: str = "client", flags: bool = False, **options: Any
    ) -> None:
        self.server = server
        self.client_id = client_id
        url = server.url.replace("http", "ws", 1)
        self.socket = websocket.create_connection(
            f"{url}/ws?clientId={client_id}", timeout=PATIENCE, **options
        )
        self.opened.append(self.socket)
        if flags:
            self.socket.send('{"type":"feature_flags","data":{"supports_preview_metadata":true}}')

    def post(self, graph: dict[str, Any], **fields: Any) -> str:
        return post(self.server, graph, client_id=self.client_id, **fields)

    def receive(self) -> Any:
        message = self.socket.recv()
        return message if isinstance(message, bytes) else json.loads(message)

    def until(self, kind: str) -> list[Any]:
        """Return the messages up to one of this type, which is the last."""
        messages = []
        while True:
            messages.append(self.receive())
            if kind_of(messages[-1]) == kind:
                return messages

    def end(self) -> list[Any]:
        """Return the messages up to the end of a prompt."""
        messages = self.until("executing")
        while messages[-1]["data"]["node"] is not None:
            messages += self.until("executing")
        return messages

    def run(self, graph: dict[str, Any], **fields: Any) -> list[Any]:
        self.post(graph, **fields)
        return self.end()

    def rest(self) -> list[Any]:
        """Return what still comes before the connection breaks."""
        messages: list[Any] = []
        with pytest.raises((OSError, websocket.WebSocketException)):
            messages.extend(iter(self.receive, None))
        return messages


def kind_of(message: Any) -> str:
    return "preview" if isinstance(message, bytes) else str(message["type"])


def post(server: DevServer, graph: dict[str, Any], **fields: Any) -> str:
    response = call(server, "POST", "/prompt", json={"prompt": graph, **fields})
    assert response.status_code == 200, response.text
    return str(response.json()["prompt_id"])


def call(server: DevServer, method: str, path: str, **options: Any) -> requests.Response:
    return requests.request(method, server.url + path, timeout=PATIENCE, **options)


def get(server: DevServer, path: str, **options: Any) -> Any:
    return call(server, "GET", path, **options).json()


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def plain(color: int = 0, prefix: str = "plain") -> dict[str, Any]:
    return {
        "1": node("EmptyImage", width=16, height=8, batch_size=1, color=color),
        "2": node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }


def bench(seed: int = 0, *, size: int = 16, **inputs: Any) -> dict[str, Any]:
    values = {"batch_size": 1, "steps": 3, "seconds": 0.0, "fail": "", "text": "", **inputs}
    return {
        "1": node("BenchSampler", seed=seed, width=size, height=size, **values),
        "2": node("SaveImage", images=["1", 0], filename_prefix="bench"),
    }


def endless(seed: int = 0) -> dict[str, Any]:
    return bench(seed, steps=1000, seconds=100.0)


def text_to_image(seed: int = 1, text: str = "a fox", size: int = 128) -> dict[str, Any]:
    sampler = {"steps": 4, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    links = {
        "model": ["4", 0],
        "positive": ["6", 0],
        "negative": ["7", 0],
        "latent_image": ["5", 0],
    }
    return {
        "3": node("KSampler", seed=seed, denoise=1.0, **sampler, **links),
        "4": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "5": node("EmptyLatentImage", width=size, height=size, batch_size=2),
        "6": node("CLIPTextEncode", text=text, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="ugly", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="ComfyUI"),
    }


def finished(number: int = 1) -> Callable[[DevServer], bool]:
    """A condition: so many prompts have ended."""
    ends = {"success", "error", "interrupted", "deleted", "lost"}
    return lambda server: sum(record.status in ends for record in server.prompts) >= number


def running(server: DevServer) -> bool:
    return any(record.executed_nodes or record.started for record in server.prompts)


def output(server: DevServer, prompt_id: str) -> list[dict[str, str]]:
    outputs = get(server, f"/history/{prompt_id}")[prompt_id]["outputs"]
    return [file for value in outputs.values() for file in value["images"]]


def pixels(server: DevServer, file: dict[str, str]) -> Image.Image:
    response = call(server, "GET", "/view", params=file)
    assert response.status_code == 200
    return Image.open(io.BytesIO(response.content))
