"""The dev server against recordings of real servers.

Each recording is replayed over real HTTP and a real websocket, and every answer and every message
is compared. What differs from run to run is made equal on both sides, and only that: prompt ids,
times, the random part of temporary names, tracebacks, and the pixels of images.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from PIL import Image

from comfy_executors.devserver import DevServer

RECORDINGS = Path(__file__).parent.parent / "recordings"
PATIENCE = 20.0

# Recordings that send requests while a sampler takes its steps: where its progress falls among the
# other messages is a race. There it takes five times as long, so that a busy machine does not lose
# the race against the whole prompt.
RACES = {
    "04_client_chosen_prompt_id_and_duplicate",
    "06_interrupt_running",
    "07_delete_pending",
    "19_cancel_by_id",
}
# Files that recordings before have left, which decide on the numbers of new ones.
FILES_BEFORE = {
    "02_identical_again_is_cached": ["output/plainbf0f17_00000_.png"],
    "04_client_chosen_prompt_id_and_duplicate": ["output/pbf0f17_00004_.png"],
    "07_delete_pending": ["output/pbf0f17_00008_.png"],
    "15_object_info_and_misc": ["input/a b ü.png"],
    "18_previews_with_and_without_the_feature_flag": ["output/x_00002_.png"],
}
UPLOADS = [
    ("in.png", "first"),
    ("in.png", "first"),
    ("in.png", "second"),
    ("in.png", "first"),
    ("a b ü.png", "first"),
    ("in.png", "first"),
    ("x.txt", "first"),
    None,
]


def recorded(version: str, name: str) -> Any:
    path = RECORDINGS / f"comfyui-{version}" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def all_recordings() -> list[tuple[str, str]]:
    return [
        (path.parent.name[len("comfyui-") :], path.stem)
        for path in sorted(RECORDINGS.glob("*/[0-9]*.json"))
    ]


@pytest.mark.parametrize(("version", "name"), all_recordings())
def test_replay(version: str, name: str) -> None:
    with DevServer(version=version, checkpoints=()) as server:
        for file in FILES_BEFORE.get(name, []):
            (server.directory / file).write_bytes(b"")
        replay = Replay(server, name)
        if name.startswith("02"):
            # The recording before is what makes this one cached.
            replay.run(recorded(version, "01_plain_success"))
        replay.run(slowed(recorded(version, name)) if name in RACES else recorded(version, name))
        replay.finish()


def slowed(events: Any) -> Any:
    return json.loads(json.dumps(events).replace('"seconds": 0.3', '"seconds": 1.5'))


def test_every_recording_is_replayed() -> None:
    assert len(all_recordings()) == 19


def test_object_info_is_the_real_one() -> None:
    real = recorded("0.33.0", "object_info")
    with DevServer(checkpoints=()) as server:
        (server.directory / "input" / "a b ü.png").write_bytes(b"")
        ours = requests.get(f"{server.url}/object_info", timeout=PATIENCE).json()
    without_encoder = {"CreateVideo", "SaveVideo"}
    assert set(real) - set(ours) == without_encoder
    assert set(ours) - set(real) == {"BenchSampler", "LoadImagesFromDir", "SaveWEBM"}
    for class_type in set(real) - without_encoder:
        assert without_models(ours[class_type]) == without_models(real[class_type])


def without_models(description: dict[str, Any]) -> dict[str, Any]:
    names = {"ckpt_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name"}
    required = {
        name: [[], *config[1:]] if name in names | {"lora_name"} else config
        for name, config in description["input"]["required"].items()
    }
    return {**description, "input": {**description["input"], "required": required}}


class Replay:
    """Does what a recording did, and compares what comes back."""

    def __init__(self, server: DevServer, name: str) -> None:
        self.server = server
        self.is_race = name in RACES
        self.ids: dict[str, str] = {}
        self.first_numbers: tuple[float, float] | None = None
        self.uploads = iter(UPLOADS)
        self.socket: websocket.WebSocket | None = None
        self.with_flags = False
        self.early: list[Any] = []
        self.images = {"first": png_bytes(0), "second": png_bytes(255)}

    def run(self, events: list[dict[str, Any]]) -> None:
        for event in without_video(in_causal_order(events)):
            if "note" in event:
                self.with_flags = True
            elif "http" in event:
                self.request(event)
            elif event["ws"] == "binary":
                self.compare_frame(event)
            elif isinstance(event["ws"], dict):
                if "sid" in event["ws"]["data"]:
                    self.connect(event["ws"]["data"]["sid"])
                self.compare_message(event["ws"])

    def connect(self, client_id: str) -> None:
        if self.socket is not None:
            self.finish()
        url = self.server.url.replace("http://", "ws://")
        self.socket = websocket.create_connection(
            f"{url}/ws?clientId={client_id}", timeout=PATIENCE
        )
        if self.with_flags:
            flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            self.socket.send(json.dumps(flags))

    def finish(self) -> None:
        """See that nothing came which is not in the recording."""
        assert self.socket is not None
        # Clearing an empty queue makes the server send one status: what comes before is too much.
        requests.post(f"{self.server.url}/queue", json={"clear": True}, timeout=PATIENCE)
        while self.early:
            assert is_progress(self.early.pop(0))
        fence = json.loads(self.socket.recv())
        assert fence == {
            "type": "status",
            "data": {"status": {"exec_info": {"queue_remaining": 0}}},
        }
        self.socket.close()

    def request(self, event: dict[str, Any]) -> None:
        method, path = self.translated(event["http"]).split(" ", 1)
        arguments: dict[str, Any] = {}
        if path == "/upload/image":
            arguments = {"data": event["data"], "files": self.next_upload()}
        elif "data" in event:
            arguments = {"data": event["data"]}
        elif "sent" in event:
            arguments = {"json": self.translated(event["sent"])}
        response = requests.request(method, self.server.url + path, timeout=PATIENCE, **arguments)
        if needs_encoder(event):
            assert response.json()["error"]["type"] == "missing_node_type"
            return
        self.learn(event, response)
        assert response.status_code == event["status"]
        assert response.headers.get("Content-Type") == event["content_type"]
        assert self.equalised(body_of(response)) == self.equalised(event["body"], real=True)

    def next_upload(self) -> dict[str, Any]:
        upload = next(self.uploads)
        # An empty part without a file name keeps the request multipart.
        return (
            {"other": (None, "")}
            if upload is None
            else {"image": (upload[0], self.images[upload[1]])}
        )

    def learn(self, event: dict[str, Any], response: requests.Response) -> None:
        if event["http"] == "POST /prompt" and event["status"] == 200:
            theirs, ours = event["body"], response.json()
            self.ids[theirs["prompt_id"]] = ours["prompt_id"]
            if self.first_numbers is None:
                self.first_numbers = (theirs["number"], ours["number"])

    def translated(self, value: Any) -> Any:
        """Put our prompt ids in place of the recorded ones."""
        text = json.dumps(value)
        for theirs, ours in self.ids.items():
            text = text.replace(theirs, ours)
        return json.loads(text)

    def equalised(self, value: Any, real: bool = False) -> Any:
        number = 0.0 if self.first_numbers is None else self.first_numbers[0 if real else 1]
        return equalised(self.translated(value), number)

    def receive(self) -> Any:
        assert self.socket is not None
        message = self.socket.recv()
        return message if isinstance(message, bytes) else json.loads(message)

    def compare_message(self, real: dict[str, Any]) -> None:
        ours = self.take_early(real)
        while ours is None:
            received = self.receive()
            if self.is_race and is_progress(received) != is_progress(real):
                self.early.append(received)
            else:
                ours = received
        assert self.equalised(ours) == self.equalised(real, real=True)

    def take_early(self, real: dict[str, Any]) -> Any:
        for index, message in enumerate(self.early):
            if is_progress(message) == is_progress(real):
                return self.early.pop(index)
        return None

    def compare_frame(self, event: dict[str, Any]) -> None:
        ours = self.receive()
        real = bytes.fromhex(event["head_hex"])
        assert isinstance(ours, bytes)
        assert struct.unpack(">I", ours[:4])[0] == event["event_type"]
        if event["event_type"] == 1:
            # The format, and the first bytes of the file, which tell the format again.
            assert ours[:11] == real[:11]
            return
        # The length of the metadata, and as much of its text as was recorded.
        assert ours[4:8] == real[4:8]
        text = real[8:].decode()
        for theirs, our_id in self.ids.items():
            text = text.replace(theirs, our_id)
        assert ours[8:].startswith(text.encode())
        length = struct.unpack(">I", ours[4:8])[0]
        assert json.loads(ours[8 : 8 + length])["image_type"] in ("image/jpeg", "image/png")


def in_causal_order(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put each post before the messages that it caused; answers were recorded when complete."""
    ordered: list[dict[str, Any]] = []
    posted: set[str] = set()
    for event in events:
        place = len(ordered)
        if event.get("http") == "POST /queue":
            while is_plain_status(ordered[place - 1]) and ordered[place - 1] == ordered[-1]:
                place -= 1
        if event.get("http") == "POST /prompt" and event["status"] == 200:
            prompt_id = event["body"]["prompt_id"]
            if prompt_id not in posted:  # what was said of it before is not of this post
                first = (i for i, other in enumerate(ordered) if is_start_of(other, prompt_id))
                place = next(first, place)
            posted.add(prompt_id)
            while place < len(ordered) and is_plain_status(ordered[place - 1]):
                place -= 1
        ordered.insert(place, event)
    return ordered


def needs_encoder(event: dict[str, Any]) -> bool:
    return event.get("http") == "POST /prompt" and "CreateVideo" in json.dumps(event)


def without_video(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Leave out what came of a graph with a video encoder: the server has none and says so."""
    is_left_out = False
    for event in events:
        if event.get("http") == "POST /prompt":
            is_left_out = needs_encoder(event)
            yield event
        elif not is_left_out:
            yield event


def is_start_of(event: dict[str, Any], prompt_id: str) -> bool:
    message = event.get("ws")
    return isinstance(message, dict) and message["data"].get("prompt_id") == prompt_id


def is_plain_status(event: dict[str, Any]) -> bool:
    message = event.get("ws")
    return (
        isinstance(message, dict) and message["type"] == "status" and "sid" not in message["data"]
    )


def is_progress(message: Any) -> bool:
    """Whether a message tells of a sampler's step, and not of the start or end of a node."""
    if not isinstance(message, dict):
        return False
    if message["type"] == "progress":
        return True
    states = message["data"].get("nodes", {}) if message["type"] == "progress_state" else {}
    return any(state["state"] == "running" and state["value"] > 0 for state in states.values())


def body_of(response: requests.Response) -> Any:
    content_type = response.headers.get("Content-Type", "")
    if "json" in content_type:
        return response.json()
    if content_type.startswith("image/"):
        return {"bytes": len(response.content)}
    return {"text": response.text}


def equalised(value: Any, first_number: float) -> Any:
    """Replace what differs from run to run; prompt numbers are counted from the first one."""
    if isinstance(value, list):
        if len(value) == 5 and isinstance(value[0], (int, float)) and isinstance(value[2], dict):
            value = [value[0] - first_number, *value[1:]]
        return [equalised(item, first_number) for item in value]
    if isinstance(value, dict):
        return {key: equalised_field(key, item, first_number) for key, item in value.items()}
    if isinstance(value, str):
        value = re.sub(r"^ComfyUI_temp_[a-z]{5}_", "ComfyUI_temp_?????_", value)
        return re.sub(r"^(tensor\(.*|\d+ images of \d+x\d+ pixels)$", "images", value, flags=re.S)
    return value


def equalised_field(key: str, value: Any, first_number: float) -> Any:
    if key in ("timestamp", "create_time", "execution_start_time", "execution_end_time"):
        assert isinstance(value, int)
        assert value > 1_600_000_000_000
        return "a time"
    if key == "traceback":
        assert value
        assert all(isinstance(line, str) for line in value)
        return "a traceback"
    if key == "bytes":
        assert value > 0
        return "some bytes"
    if key in ("number", "priority"):
        return value - first_number
    return equalised(value, first_number)


def png_bytes(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), gray).save(buffer, "PNG")
    return buffer.getvalue()
