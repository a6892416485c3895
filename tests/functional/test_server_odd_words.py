"""Messages and history of any shape: what comes of them is a result or an error of ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_kit import PATIENCE, bench_graph

from comfy_executors import ComfyExecutorsError, NodeExecutionError, ProgressEvent
from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.clients.comfyui_events import EventStream
from comfy_executors.clients.comfyui_frames import EventParser, PromptEvent
from comfy_executors.clients.http import DeadlineWaiter, HttpClient
from comfy_executors.executors.comfy_prompt import ComfyPrompt
from comfy_executors.executors.control import JobControl
from comfy_executors.runs import Batch, Job, RunOptions, WorkflowRun

GRAPH = bench_graph()
FILES = {"a.png": b"picture"}

# What JSON can say, half of a surrogate pair and numbers that are none among it, and often of
# nearly the right shape.
texts = st.text(st.characters(), max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
names = st.sampled_from(["a.png", "../b.png", "", "\ud800.png", "c.txt", "d" * 5000])
files = st.fixed_dictionaries(
    {"filename": names | anything},
    optional={"subfolder": anything, "type": st.sampled_from(["output", "temp"]) | anything},
)
keys = st.sampled_from(["images", "text", "gifs"]) | texts
reports = anything | st.dictionaries(
    keys, st.lists(files | anything, max_size=3) | anything, max_size=3
)
nodes = st.sampled_from(["1", "2", "9"]) | anything
PARTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "execution_start": {},
    "execution_cached": {"nodes": st.lists(nodes, max_size=3) | anything},
    "executing": {"node": nodes},
    "progress": {"node": nodes, "value": scalars | anything, "max": scalars | anything},
    "executed": {"node": nodes, "output": reports},
    "execution_success": {},
    "execution_error": {
        "node_id": nodes,
        "node_type": anything,
        "exception_type": anything,
        "exception_message": anything,
        "traceback": st.lists(texts | anything, max_size=3) | anything,
    },
    "execution_interrupted": {"node_id": nodes},
    "of_a_custom_node": {"output": reports},
}
messages = st.lists(
    st.one_of(
        *(
            st.tuples(st.just(kind), st.fixed_dictionaries({}, optional=parts))
            for kind, parts in PARTS.items()
        )
    ).map(list)
    | anything,
    max_size=4,
)
entries = anything | st.fixed_dictionaries(
    {},
    optional={
        "outputs": anything | st.dictionaries(texts, reports, max_size=3),
        "status": anything
        | st.fixed_dictionaries(
            {},
            optional={
                "status_str": st.sampled_from(["success", "error"]) | anything,
                "messages": messages | anything,
            },
        ),
    },
)

many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Server(ThreadingHTTPServer):
    """Has one prompt, `id`, which runs; one file; and the history that a test gives it."""

    daemon_threads = True
    history: Any = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/view"):
            found = self.path.startswith("/view?filename=a.png&")
            self.answer(200 if found else 404, FILES["a.png"], "image/png")
        elif self.path == "/queue":
            queue = {"queue_running": [[0, "id"]], "queue_pending": []}
            self.answer(200, json.dumps(queue).encode(), "application/json")
        else:
            body = json.dumps(self.server.history).encode()
            self.answer(200, body, "application/json")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ComfyUIClient]:
    http = HttpClient(f"http://127.0.0.1:{server.server_address[1]}")
    yield ComfyUIClient(http)
    http.close()


@pytest.fixture
def told() -> list[ProgressEvent]:
    return []


@pytest.fixture
def prompt_of(client: ComfyUIClient, told: list[ProgressEvent]) -> Any:
    """Makes a prompt as it is once it was posted."""
    runs = []  # that an executor would hold

    def make() -> ComfyPrompt:
        batch = Batch(0, 1, None, lambda batch: GRAPH)
        options = RunOptions(on_progress=told.append, timeout=PATIENCE)
        run = WorkflowRun(
            [batch], Job((batch,)), options, lock=threading.RLock(), window=1, on_room=lambda: None
        )
        runs.append(run)
        control = JobControl(run, lambda: None)
        events = EventStream(client.http)
        prompt = ComfyPrompt(client, events, control, Job((batch,)), batch, GRAPH)
        prompt._id = "id"
        return prompt

    return make


@pytest.mark.parametrize("kind", sorted(PARTS))
def test_messages(kind: str, server: Server, prompt_of: Any) -> None:
    parts = PARTS[kind]
    shapes = st.fixed_dictionaries({}, optional=parts) | st.dictionaries(texts, anything)

    @many
    @given(shapes)
    def check(data: dict[str, Any]) -> None:
        server.history = {}
        frame = json.dumps({"type": kind, "data": {**data, "prompt_id": "id"}}).encode()
        event = EventParser().text(frame)
        assert event is not None
        with suppress(ComfyExecutorsError):
            prompt_of()._take(event)

    check()


def test_history(server: Server, client: ComfyUIClient, prompt_of: Any) -> None:
    @many
    @given(entries)
    def check(entry: Any) -> None:
        server.history = {"id": entry}
        with suppress(ComfyExecutorsError):
            found = client.history("id", GRAPH, DeadlineWaiter(PATIENCE))
            if found is not None:
                prompt_of()._settle(found)

    check()


@pytest.mark.parametrize("data", [{"value": float("nan"), "max": 3}, {"value": 1, "max": 1e999}])
def test_a_step_that_is_no_number_is_not_told(
    data: dict[str, Any], prompt_of: Any, told: list[ProgressEvent]
) -> None:
    prompt = prompt_of()
    prompt._take(PromptEvent("progress", "id", {**data, "node": "1"}))
    assert told == []
    prompt._take(PromptEvent("progress", "id", {"value": 2.0, "max": 3, "node": "1"}))
    assert [(event.step, event.max) for event in told] == [(2, 3)]


def test_what_is_understood_is_taken_out_of_what_is_not(prompt_of: Any) -> None:
    prompt = prompt_of()
    output = {
        "images": [{"filename": "a.png"}, 7, {"filename": 5}, {"filename": "a.png"}],
        "gifs": "a.gif",
        "text": ["hello"],
        "animated": [True],
    }
    prompt._take(PromptEvent("execution_cached", "id", {"nodes": ["2", 5, {}]}))
    prompt._take(PromptEvent("executed", "id", {"node": "2", "output": output}))
    assert [(image.name, image.data, image.cached) for image in prompt._made.images] == [
        ("a.png", FILES["a.png"], True)
    ]
    texts_of = [made.text for made in prompt._made.outputs]
    assert texts_of == ["7", '{"filename": 5}', "hello"]


def test_an_odd_traceback_is_an_error_of_the_node(prompt_of: Any) -> None:
    data = {"node_id": "1", "exception_message": None, "traceback": [{"line": 1}, "two"]}
    with pytest.raises(NodeExecutionError) as caught:
        prompt_of()._take(PromptEvent("execution_error", "id", data))
    assert caught.value.traceback == "{'line': 1}two"


def test_brackets_nested_too_deep_are_an_error_of_ours(client: ComfyUIClient) -> None:
    class Deep(Handler):
        def do_GET(self) -> None:
            self.answer(200, b"[" * 200_000, "application/json")

    with Server(("127.0.0.1", 0), Deep) as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        http = HttpClient(f"http://127.0.0.1:{other.server_address[1]}")
        try:
            with pytest.raises(ComfyExecutorsError, match="no ComfyUI server"):
                ComfyUIClient(http).queue(DeadlineWaiter(PATIENCE))
        finally:
            http.close()
            other.shutdown()
            thread.join()
