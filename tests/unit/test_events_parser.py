"""Websocket frames, as recorded from real servers and as nobody would send them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_executors.clients.comfyui_frames import EventParser, ImageEvent, PromptEvent

RECORDINGS = Path(__file__).parent.parent / "recordings"
FILES = sorted(RECORDINGS.glob("comfyui-*/[0-9]*.json"))


def frames(path: Path) -> list[bytes | dict[str, Any]]:
    """The websocket's messages of a recording: text as bytes, binary ones as they are noted."""
    lines = [line for line in json.loads(path.read_text()) if "ws" in line]
    return [
        line if line["ws"] == "binary" else json.dumps(line["ws"]).encode()
        for line in lines
        if line["ws"] == "binary" or isinstance(line["ws"], dict)
    ]


def binary(noted: dict[str, Any]) -> bytes:
    """The head of a recorded frame; its metadata, which was cut short in its end, made whole."""
    head = bytes.fromhex(noted["head_hex"])
    if noted["event_type"] != 4:
        return head
    missing = struct.unpack_from(">I", head, 4)[0] - (len(head) - 8)
    ends = {len(end): end for end in (b' "image/jpeg"}', b' "image/png"}')}
    return head + ends[missing]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recorded_frames_become_events(path: Path) -> None:
    parser = EventParser()
    for frame in frames(path):
        if isinstance(frame, dict):
            assert isinstance(parser.binary(binary(frame)), ImageEvent)
            continue
        message = json.loads(frame)
        event = parser.text(frame)
        if event is None:
            assert message["type"] in ("status", "feature_flags", "progress_state")
        else:
            assert event == PromptEvent(
                message["type"], message["data"]["prompt_id"], message["data"]
            )


def test_recorded_images_name_their_node_with_and_without_the_flag() -> None:
    path = RECORDINGS / "comfyui-0.33.0" / "18_previews_with_and_without_the_feature_flag.json"
    parser, seen, executing = EventParser(), [], ""
    for frame in frames(path):
        if isinstance(frame, dict):
            event = parser.binary(binary(frame))
            assert event is not None
            assert event.node_id == executing
            seen.append(frame["event_type"])
        else:
            message = json.loads(frame)
            executing = message["data"].get("node", executing)
            parser.text(frame)
    assert set(seen) == {1, 4}


@pytest.mark.parametrize(("number", "suffix"), [(1, ".jpg"), (2, ".png"), (9, ".png")])
def test_an_image_without_metadata_belongs_to_the_executing_node(number: int, suffix: str) -> None:
    parser = EventParser()
    frame = struct.pack(">II", 1, number) + b"data"
    assert parser.binary(frame) is None
    parser.text(b'{"type": "executing", "data": {"node": "57:3", "prompt_id": "p"}}')
    assert parser.binary(frame) == ImageEvent("p", "57:3", suffix, b"data")
    parser.text(b'{"type": "executing", "data": {"node": null, "prompt_id": "p"}}')
    assert parser.binary(frame) is None


def test_an_image_with_metadata_names_its_node() -> None:
    about = b'{"prompt_id": "p", "node_id": "3", "image_type": "image/jpeg"}'
    frame = struct.pack(">II", 4, len(about)) + about + b"data"
    assert EventParser().binary(frame) == ImageEvent("p", "3", ".jpg", b"data")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"null",
        b"[]",
        b'{"type": "executing"}',
        b'{"type": "executing", "data": []}',
        b'{"type": "executing", "data": {"node": "1"}}',  # as after a reconnection
        b'{"type": "executing", "data": {"node": "1", "prompt_id": 7}}',
        b'{"type": "status", "data": null}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
    ],
)
def test_text_that_concerns_no_prompt(frame: bytes) -> None:
    assert EventParser().text(frame) is None


@pytest.mark.parametrize(
    "about", [b"", b"null", b"{}", b"[" * 200_000, b'{"prompt_id": "p"}', b"\xff"]
)
def test_images_with_broken_metadata(about: bytes) -> None:
    assert EventParser().binary(struct.pack(">II", 4, len(about)) + about) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
MESSAGES = st.builds(
    lambda kind, data: json.dumps({"type": kind, "data": data}).encode(),
    st.sampled_from(["executing", "executed", "status", "x"]) | JSON,
    st.fixed_dictionaries({}, optional={"prompt_id": JSON, "node": JSON, "output": JSON}) | JSON,
)
HEADS = st.builds(
    lambda kind, length, rest: struct.pack(">II", kind, length) + rest,
    st.sampled_from([0, 1, 2, 3, 4, 2**32 - 1]),
    st.integers(0, 2**32 - 1),
    st.binary() | JSON.map(lambda value: json.dumps(value).encode()),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.binary() | MESSAGES | HEADS)))
def test_no_frame_raises(received: list[tuple[bool, bytes]]) -> None:
    parser = EventParser()
    for is_text, frame in received:
        event = parser.text(frame) if is_text else parser.binary(frame)
        assert event is None or isinstance(event.prompt_id, str)
