"""The floor: what a program without errors, retries and cancelling needs for the same images."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import websocket


def run_floor(address: str, graphs: list[dict[str, Any]], threads: int) -> int:
    """Run graphs of one image each and return the number of bytes that came.

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
    sessions = threading.local()

    def session() -> requests.Session:
        if not hasattr(sessions, "session"):
            sessions.session = requests.Session()
            # Looking for proxies in the environment takes a good part of each call.
            sessions.session.trust_env = False
        return sessions.session

    def post(graph: dict[str, Any]) -> None:
        body = {"prompt": graph, "client_id": client_id}
        session().post(f"http://{address}/prompt", json=body).raise_for_status()

    def fetch(image: dict[str, str]) -> int:
        return len(session().get(f"http://{address}/view", params=image).content)

    with ThreadPoolExecutor(threads) as posting, ThreadPoolExecutor(threads) as fetching:
        posts = [posting.submit(post, graph) for graph in graphs]
        fetches = []
        while len(fetches) < len(graphs):
            frame = socket.recv()
            message = json.loads(frame)
            if message["type"] == "executed":
                for image in message["data"]["output"]["images"]:
                    fetches.append(fetching.submit(fetch, image))
        for done in posts:
            done.result()
        size = sum(done.result() for done in fetches)
    socket.close()
    return size
