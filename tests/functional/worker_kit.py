"""What the tests of the workers share: job documents, and what comes of their events."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from server_kit import bench_graph

from comfy_executors import wire
from comfy_executors.errors import InputImageError, WorkflowRejectedError

EVENT_BYTES = 1_000_000  # what RunPod takes as one chunk


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def document(*graphs: dict[str, Any], **changes: Any) -> wire.JobDocument:
    values: dict[str, Any] = {"request_id": str(uuid.uuid4()), **changes}
    items = tuple(wire.JobGraph(index, 1, None, graph) for index, graph in enumerate(graphs))
    return wire.JobDocument(graphs=items, **values)


def bench_document(count: int, seconds: float = 0.0, **inputs: Any) -> wire.JobDocument:
    """So many batches that differ in their seeds."""
    return document(*(bench_graph(seconds, **{**inputs, "seed": seed}) for seed in range(count)))


def load_graph(name: str, prefix: str = "loaded") -> dict[str, Any]:
    return {
        "1": node("LoadImage", image=name),
        "2": node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }


@dataclass
class Answer:
    """A job's events, put together."""

    events: list[dict[str, Any]]
    batches: dict[int, wire.CompleteBatch] = field(default_factory=dict)
    failures: dict[int | None, Exception] = field(default_factory=dict)
    missing: list[wire.Missing] = field(default_factory=list)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(event["kind"] for event in self.events)

    @property
    def attempts(self) -> set[int]:
        return {event["attempt"] for event in self.events}

    def data(self, batch: int) -> list[bytes | None]:
        return [output.data for output in self.batches[batch].outputs]

    def summary(self) -> list[Any]:
        """The events but for their attempt and progress."""
        kept = [event for event in self.events if event["kind"] != "progress"]
        return [{**event, "attempt": 0, "seq": 0} for event in kept]


def put_together(events: Iterable[dict[str, Any]], document: wire.JobDocument) -> Answer:
    """Assemble a job's events, and check what holds for all of them."""
    listed = [json.loads(json.dumps(event, allow_nan=False)) for event in events]
    answer = Answer(listed)
    assembler = wire.Assembler(item.batch for item in document.graphs)
    for event in listed:
        assert len(json.dumps(event)) < EVENT_BYTES
        for news in assembler.add(event):
            if isinstance(news, wire.CompleteBatch):
                assert news.batch not in answer.batches
                answer.batches[news.batch] = news
            elif isinstance(news, wire.Failed):
                answer.failures[news.batch] = news.error
    answer.missing = assembler.missing()
    assert [event["seq"] for event in listed] == list(range(len(listed)))
    assert listed[-1]["kind"] == "end"
    outputs = sum(len(batch.outputs) for batch in answer.batches.values())
    end = {key: listed[-1][key] for key in ("batches", "outputs", "errors")}
    assert end == {
        "batches": len(answer.batches),
        "outputs": outputs,
        "errors": len(answer.failures),
    }
    return answer


# What no worker may run: changes of a document, the error that they are, and words of it.
HOSTILE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"version": 2}, WorkflowRejectedError, "version 1, not 2"),
    ({"graphs": []}, WorkflowRejectedError, "at least one graph"),
    ({"graphs": [{}]}, WorkflowRejectedError, "each of graphs"),
    ({"request_id": "../x"}, WorkflowRejectedError, "request_id"),
    ({"input_images": [{"name": "a/b.png", "data": "AAAA"}]}, InputImageError, "folders"),
    ({"input_images": [{"name": "a.png", "data": "A!"}]}, InputImageError, "base64"),
    ({"input_images": [{"name": "a.png"}]}, InputImageError, "neither bytes"),
]
