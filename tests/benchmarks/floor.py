"""The floor: what a program without errors, retries and cancelling needs for the same images."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests
import websocket


def run_floor(address: str, graphs: list[dict[str, Any]], threads: int) -> int:
    """Run graphs that save in one node each, and return the number of bytes that came.

    All prompts are posted at once, and each image is fetched as it is announced.

    Args:
        address: Host and port of the server.
        graphs: The graphs.
        threads: How many threads post, and how many fetch.
    """
    client_id = uuid.uuid4().hex
    socket = websocket.create_connection(
        f"ws://{address}/ws?clientId={client_id}", skip_utf8_validation=True
    )
    own = threading.local()

    def open_session() -> None:
        own.session = requests.Session()
        # Looking for proxies in the environment takes a good part of each call.
        own.session.trust_env = False

    def post(graph: dict[str, Any]) -> None:
        body = {"prompt": graph, "client_id": client_id}
        own.session.post(f"http://{address}/prompt", json=body).raise_for_status()

    def fetch(image: dict[str, str]) -> int:
        return len(own.session.get(f"http://{address}/view", params=image).content)

    posting = ThreadPoolExecutor(threads, initializer=open_session)
    fetching = ThreadPoolExecutor(threads, initializer=open_session)
    with posting, fetching:
        posts = [posting.submit(post, graph) for graph in graphs]
        fetches: list[Future[int]] = []
        reports = 0
        while reports < len(graphs):
            message = json.loads(socket.recv())
            if message["type"] == "executed":
                reports += 1
                images = message["data"]["output"]["images"]
                fetches += [fetching.submit(fetch, image) for image in images]
        for posted in posts:
            posted.result()
        size = sum(fetched.result() for fetched in fetches)
    socket.close()
    return size
