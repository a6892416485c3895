"""The job document and its events: there and back, and whole again however they arrive."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import pickle
import random
import uuid
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_executors import errors, wire
from comfy_executors.errors import (
    ComfyExecutorsError,
    InputImageError,
    NodeExecutionError,
    NodeProblem,
    ServerResponseError,
    WorkflowError,
    WorkflowRejectedError,
    WorkflowTimeoutError,
)

REQUEST_ID = "0b1f4a1e-9d7c-4a55-8f0e-6d2c3b4a5e6f"
GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {"color": 3}}}


def document(**changes: Any) -> wire.JobDocument:
    values: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "graphs": (wire.JobGraph(0, 8, 7, GRAPH), wire.JobGraph(3, 4, None, GRAPH)),
        "input_images": (wire.InputFile("ab_0000.png", b"\x89PNG"),),
        "options": wire.JobOptions(True, False, 2.5),
    }
    return wire.JobDocument(**{**values, **changes})


def raw_document(**changes: Any) -> dict[str, Any]:
    return {**wire.encode_document(document()), **changes}


# Documents.


def test_a_document_comes_back_from_json_as_it_was() -> None:
    text = json.dumps(wire.encode_document(document()))
    assert wire.decode_document(json.loads(text)) == document()


def test_a_request_names_the_bytes_of_an_image_once() -> None:
    request = wire.encode_request(document(), joined=GRAPH)
    assert request["images"] == [{"name": "ab_0000.png", "image": "iVBORw=="}]
    assert request["comfy_executors"]["input_images"] == [{"name": "ab_0000.png"}]
    assert json.dumps(request).count("iVBORw==") == 1
    assert request["workflow"] == GRAPH
    assert wire.decode_request(request) == document()


def test_a_request_for_our_worker_alone_has_no_workflow_and_urls_stay_urls() -> None:
    files = (wire.InputFile("a.png", url="https://example.org/a.png"),)
    request = wire.encode_request(document(input_images=files))
    assert set(request) == {"comfy_executors"}
    assert wire.decode_request(request).input_images == files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 1, not 2"),
        ({"version": None}, "version 1, not None"),
        ({"request_id": "job-1"}, "request_id must be a UUID"),
        ({"request_id": 7}, "request_id must be a UUID"),
        ({"graphs": []}, "at least one graph"),
        ({"graphs": {}}, "graphs must be a list"),
        ({"graphs": [7]}, "each of graphs must be an object"),
        ({"graphs": [{"batch": 0, "size": 1, "graph": []}]}, "each of graphs"),
        ({"graphs": [{"batch": -1, "size": 1, "graph": {}}]}, "batch must be a whole number"),
        ({"graphs": [{"batch": True, "size": 1, "graph": {}}]}, "batch must be a whole number"),
        ({"graphs": [{"batch": 0, "size": 0, "graph": {}}]}, "size must be a whole number"),
        ({"graphs": [{"batch": 0, "size": 1, "seed": 2**64, "graph": {}}]}, "seed must be"),
        ({"graphs": [{"batch": 0, "size": 1, "graph": {}}] * 2}, "same batch number"),
        ({"options": []}, "options must be an object"),
        ({"options": {"allow_partial": "yes"}}, "allow_partial must be true or false"),
        ({"options": {"batch_timeout": 0}}, "batch_timeout must be seconds above 0"),
        ({"options": {"batch_timeout": math.nan}}, "batch_timeout must be seconds above 0"),
        ({"options": {"batch_timeout": True}}, "batch_timeout must be seconds above 0"),
    ],
)
def test_what_is_no_document_is_refused_with_a_reason(changes: Any, words: str) -> None:
    with pytest.raises(WorkflowRejectedError, match=words):
        wire.decode_document(raw_document(**changes))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"name": "../../etc/passwd", "data": "AAAA"}, "without folders"),
        ({"name": "a\\b.png", "data": "AAAA"}, "without folders"),
        ({"name": "..", "data": "AAAA"}, "without folders"),
        ({"name": "", "data": "AAAA"}, "without folders"),
        ({"name": "a\0.png", "data": "AAAA"}, "without folders"),
        ({"name": "x" * 300, "data": "AAAA"}, "without folders"),
        ({"data": "AAAA"}, "without folders"),
        (None, "without folders"),
        ({"name": "a.png", "data": "A!"}, "is not base64"),
        ({"name": "a.png", "data": "AAAAA"}, "is not base64"),
        ({"name": "a.png", "data": 7}, "string in base64"),
        ({"name": "a.png", "data": ""}, "is empty"),
        ({"name": "a.png"}, "neither bytes nor a url"),
        ({"name": "a.png", "url": 7}, "is not a string"),
    ],
)
def test_an_input_image_that_cannot_be_is_refused_with_a_reason(image: Any, words: str) -> None:
    with pytest.raises(InputImageError, match=words):
        wire.decode_document(raw_document(input_images=[image]))


def test_two_input_images_of_one_name_are_refused() -> None:
    image = {"name": "a.png", "data": "AAAA"}
    with pytest.raises(InputImageError, match="same name"):
        wire.decode_document(raw_document(input_images=[image, image]))


def test_base64_may_have_the_head_of_a_data_uri_and_line_breaks() -> None:
    assert wire.decode_base64("data:image/png;base64,iVBO\r\nRw==\n", "a.png") == b"\x89PNG"


# Events.

EVENTS: list[wire.Event] = [
    wire.Started(0, 1, REQUEST_ID, "comfy-executors", "0.2.0", 2),
    wire.Progress(1, 1, 0, wire.ProgressStep("step", "3", "KSampler", 2, 20)),
    wire.Progress(2, 1, 0, wire.ProgressStep("retry", message="lost")),
    wire.OutputPart(3, 1, 0, 0, 1, 2, "9", "a.png", "sub", "output", True, 9, "f" * 64, b"\0\xff"),
    wire.OutputPart(4, 1, 0, 1, 0, 1, None, "a", "", "text", False, 0, "0" * 64, b""),
    wire.OutputPart(5, 2, 0, 2, 0, 1, "9", "a", "", "temp", False, 9, "0" * 64, url="https://x/y"),
    wire.BatchEnded(6, 2, 0, 2, None, 1.5),
    wire.End(7, 2, 1, 2, 0),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_json_as_it_was(event: wire.Event) -> None:
    assert wire.decode_event(json.loads(json.dumps(wire.encode_event(event)))) == event


def test_no_event_has_the_key_that_makes_runpod_end_a_job() -> None:
    events = [*EVENTS, wire.Failed(0, 1, None, WorkflowError("no"))]
    assert not [event for event in events if "error" in wire.encode_event(event)]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        7,
        [],
        {"kind": "surprise"},
        {"kind": "end"},
        {**wire.encode_event(EVENTS[3]), "part": 2},
        {**wire.encode_event(EVENTS[3]), "parts": 10**12},
        {**wire.encode_event(EVENTS[3]), "data": "A!"},
        {**wire.encode_event(EVENTS[3]), "batch": True},
        {**wire.encode_event(EVENTS[3]), "name": None},
        {**wire.encode_event(EVENTS[1]), "event": []},
        {**wire.encode_event(EVENTS[6]), "seconds": "1"},
    ],
)
def test_what_is_no_event_is_an_error_of_the_server(raw: Any) -> None:
    with pytest.raises(ServerResponseError, match="no event of a job"):
        wire.decode_event(raw)


def test_kinds_of_a_newer_worker_are_told_from_what_is_no_event() -> None:
    others: list[Any] = [{"kind": "end"}, {"kind": 7}, {}, None, []]
    assert wire.is_of_unknown_kind({"kind": "surprise"})
    assert not any(map(wire.is_of_unknown_kind, [*map(wire.encode_event, EVENTS), *others]))


@given(st.binary(max_size=40), st.integers(1, 9))
def test_parts_are_whole_together_and_never_too_large(data: bytes, size: int) -> None:
    parts = list(wire.split(data, size))
    assert b"".join(parts) == data
    assert len(parts) == max(1, math.ceil(len(data) / size))
    assert all(len(part) <= size for part in parts)


# Errors.

PROBLEM = NodeProblem("4", "Loader", None, "ckpt", "a", "value_not_in_list", "not there", ("b",))
ERRORS: list[ComfyExecutorsError] = [
    WorkflowError("failed", prompt_id="p", server="http://127.0.0.1:8188"),
    WorkflowRejectedError([PROBLEM], "no", kind="prompt_outputs_failed_validation", prompt_id="p"),
    NodeExecutionError(
        node_id="3",
        class_type="KSampler",
        title="Sampler",
        exception_type="RuntimeError",
        exception_message="out of luck",
        traceback="File …",
    ),
    WorkflowTimeoutError("the batch_timeout of 2 s passed"),
    errors.ServerUnreachableError("gone", "http://x", transient=True, retry_after=2.0),
    errors.OutputMissingError("no file", cached=True, node_id="9"),
    WorkflowRejectedError([PROBLEM]),
    errors.GraphError("no nodes", node_id="7"),
    errors.MissingExtraError("boto3", "runpod-worker"),
    errors.TemplateVariablesError("no", missing=["a"], known=["a", "b"], source="x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_with_its_class_its_facts_and_its_words(error: Any) -> None:
    event = wire.Failed(0, 1, 2, error)
    again = wire.decode_event(json.loads(json.dumps(wire.encode_event(event))))
    assert isinstance(again, wire.Failed)
    assert type(again.error) is type(error)
    assert vars(again.error) == vars(error)
    assert str(again.error) == str(error)
    assert str(pickle.loads(pickle.dumps(again.error))) == str(error)


def test_every_class_of_errors_survives_the_way() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type)]
    ours = [cls for cls in classes if issubclass(cls, ComfyExecutorsError)]
    simple = [cls for cls in ours if can_be_made_of_a_message(cls)]
    assert len(simple) > 15
    assert [type(wire.decode_error(wire.encode_error(cls("x")))) for cls in simple] == simple


def can_be_made_of_a_message(cls: Any) -> bool:
    try:
        return "problems" not in vars(cls("x"))
    except TypeError:
        return False


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "boom",
        {},
        {"type": "SystemExit", "facts": {"code": 1}},
        {"type": "Any", "facts": {}},
        {"type": "os.system", "facts": {"message": "x"}},
        {"type": "_Timeout", "facts": {}},
        {"type": ["WorkflowError"], "facts": {}},
        {"type": "NodeExecutionError", "facts": {}},
        {"type": "WorkflowRejectedError", "facts": {"problems": 7}},
        {"type": "WorkflowRejectedError", "facts": {"problems": [{"node_id": "1"}]}},
        {"type": "WorkflowError", "facts": [1]},
        {"type": "WorkflowError", "facts": {"message": {"a": 1}, "__class__": "x", "args": 1}},
    ],
)
def test_a_hostile_error_is_a_workflow_error_with_words(raw: Any) -> None:
    error = wire.decode_error(raw)
    assert type(error) is WorkflowError
    assert str(error)


def test_an_error_of_any_size_fits_into_a_chunk_and_is_clean_json() -> None:
    problem = NodeProblem("1", None, None, "x", "A" * 9_000_000, "kind", "bad \ud800", ())
    error = WorkflowRejectedError([problem] * 500, "m" * 9_000_000)
    error.__dict__["more"] = {"nan": math.nan, "deep": [[[[[[1]]]]]], "set": {1}}
    text = json.dumps(wire.encode_error(error), ensure_ascii=False, allow_nan=False)
    assert len(text.encode()) < 1_000_000


def test_a_foreign_error_becomes_ours_and_names_itself() -> None:
    error = wire.decode_error(wire.encode_error(KeyError("seed")))
    assert type(error) is WorkflowError
    assert "KeyError: 'seed'" in str(error)


# The assembler.


def events_of(
    outputs: dict[int, list[bytes]], *, attempt: int = 1, part_bytes: int = 3
) -> list[dict[str, Any]]:
    """What a worker would send for these outputs of these batches."""
    made: list[Any] = [wire.Started(0, attempt, REQUEST_ID, "w", "1", len(outputs))]
    for batch, contents in outputs.items():
        for number, data in enumerate(contents):
            digest = hashlib.sha256(data).hexdigest()
            parts = list(wire.split(data, part_bytes))
            for part, content in enumerate(parts):
                about = ("9", f"{number}.png", "", "output", False, len(data), digest, content)
                made.append(
                    wire.OutputPart(len(made), attempt, batch, number, part, len(parts), *about)
                )
        made.append(wire.BatchEnded(len(made), attempt, batch, len(contents), "p", 1.0))
    count = sum(map(len, outputs.values()))
    made.append(wire.End(len(made), attempt, len(outputs), count, 0))
    return [json.loads(json.dumps(wire.encode_event(event))) for event in made]


OUTPUTS = st.dictionaries(
    st.integers(0, 5), st.lists(st.binary(max_size=14), max_size=3), min_size=1, max_size=4
)


@settings(max_examples=300)
@given(OUTPUTS, st.integers(1, 7), st.integers(1, 7), st.data())
def test_any_split_order_repetition_and_loss_gives_exactly_what_is_whole(
    outputs: dict[int, list[bytes]], first: int, second: int, data: st.DataObject
) -> None:
    sent = [
        *events_of(outputs, part_bytes=first),
        *events_of(outputs, attempt=2, part_bytes=second),
    ]
    arrived = data.draw(st.lists(st.sampled_from(sent), max_size=2 * len(sent)))
    assembler = wire.Assembler(outputs)
    news = [item for event in arrived for item in assembler.add(event)]

    whole = {
        (batch, number)
        for batch, contents in outputs.items()
        for number, content in enumerate(contents)
        if has_all_parts(arrived, batch, number, {1: first, 2: second})
    }
    ended = {event["batch"] for event in arrived if event["kind"] == "batch"}
    complete = {
        batch
        for batch in ended
        if all((batch, number) in whole for number in range(len(outputs[batch])))
    }
    found = Counter((o.batch, o.output) for o in news if isinstance(o, wire.WholeOutput))
    assert found == Counter(whole)
    batches = [item for item in news if isinstance(item, wire.CompleteBatch)]
    assert Counter(item.batch for item in batches) == Counter(complete)
    for item in batches:
        assert [output.data for output in item.outputs] == outputs[item.batch]
    assert set(assembler.unsettled) == set(outputs) - complete
    assert_missing_is_named(assembler.missing(), outputs, whole, ended, complete, arrived)


def has_all_parts(
    arrived: list[dict[str, Any]], batch: int, number: int, part_bytes: dict[int, int]
) -> bool:
    """Whether all parts of an output have come, cut in one way or in the other."""
    seen: dict[tuple[int, int], set[int]] = {}
    for event in arrived:
        if event["kind"] == "output" and (event["batch"], event["output"]) == (batch, number):
            cut = event["parts"], part_bytes[event["attempt"]] if event["parts"] > 1 else 0
            seen.setdefault(cut, set()).add(event["part"])
    return any(len(parts) == count for (count, _), parts in seen.items())


def assert_missing_is_named(
    missing: list[wire.Missing],
    outputs: dict[int, list[bytes]],
    whole: set[tuple[int, int]],
    ended: set[int],
    complete: set[int],
    arrived: list[dict[str, Any]],
) -> None:
    begun = {(e["batch"], e["output"]) for e in arrived if e["kind"] == "output"}
    everything = {(batch, n) for batch, contents in outputs.items() for n in range(len(contents))}
    known = {key for key in everything if key[0] in ended or key in begun}
    named = [(item.batch, item.output) for item in missing]
    expected: list[tuple[int, int | None]] = [(b, None) for b in outputs if b not in ended]
    expected += [key for key in known - whole if key[0] not in complete]
    assert Counter(named) == Counter(expected)
    assert all(str(item) for item in missing)


def test_missing_parts_are_named_by_number() -> None:
    events = events_of({4: [b"0123456789"]})
    assembler = wire.Assembler([4, 5])
    for event in events:
        if event.get("part") not in (1, 3):
            assembler.add(event)
    assert [str(item) for item in assembler.missing()] == [
        "parts 1, 3 of output 0 of batch 4",
        "the end of batch 5",
    ]


def test_a_broken_output_is_never_handed_out_and_can_be_mended() -> None:
    events = events_of({0: [b"0123456789"]})
    broken = {**events[1], "data": base64.b64encode(b"XXX").decode()}
    assembler = wire.Assembler([0])
    assert not [n for e in [broken, *events[2:]] for n in assembler.add(e) if is_result(n)]
    assert [str(item) for item in assembler.missing()] == ["output 0 of batch 0"]
    mended = [n for e in events for n in assembler.add(e) if is_result(n)]
    assert [type(item) for item in mended] == [wire.WholeOutput, wire.CompleteBatch]


def is_result(news: wire.News) -> bool:
    return isinstance(news, (wire.WholeOutput, wire.CompleteBatch))


def test_two_attempts_that_made_different_bytes_are_never_mixed() -> None:
    one, two = b"a" * 9, b"b" * 9
    events = events_of({0: [one]})[:2] + events_of({0: [two]}, attempt=1)[2:]
    assembler = wire.Assembler([0])
    assert not [n for event in events for n in assembler.add(event) if is_result(n)]
    news = [n for event in events_of({0: [one]}) for n in assembler.add(event)]
    assert [n.data for n in news if isinstance(n, wire.WholeOutput)] == [one]


def test_a_url_is_a_whole_output_with_the_promise_of_its_bytes() -> None:
    digest = hashlib.sha256(b"abc").hexdigest()
    about = ("9", "a.png", "", "output", False, 3, digest)
    event = wire.OutputPart(0, 1, 0, 0, 0, 1, *about, url="https://x/y")
    (output,) = wire.Assembler([0]).add(event)
    assert isinstance(output, wire.WholeOutput)
    assert (output.url, output.data) == ("https://x/y", None)
    assert output.matches(b"abc")
    assert not output.matches(b"abd")


def test_what_a_final_result_had_no_room_for_is_named_as_missing() -> None:
    events = events_of({0: [b"0123456789"]})
    for event in events:
        if event["kind"] == "output":
            del event["data"]
            if event["part"] > 0:
                event.clear()
    assembler = wire.Assembler([0])
    news = [item for event in events for item in assembler.add(event)]
    assert [type(item) for item in news] == [wire.Started, wire.End]
    assert [str(item) for item in assembler.missing()] == ["output 0 of batch 0"]


def test_failures_settle_a_batch_once_and_the_job_is_told_apart() -> None:
    failure = wire.Failed(3, 1, 0, WorkflowError("no"))
    whole_job = wire.Failed(4, 1, None, WorkflowError("all"))
    assembler = wire.Assembler([0, 1])
    told = [assembler.add(event) for event in (failure, failure, whole_job, whole_job)]
    assert told == [[failure], [], [whole_job], []]
    assert assembler.unsettled == (1,)
    assert str(assembler.job_error) == "all"
    assert not [n for event in events_of({0: [b"x"]})[1:3] for n in assembler.add(event)]


def test_progress_is_passed_on_once_and_never_backwards() -> None:
    steps = [wire.Progress(seq, 1, 0, wire.ProgressStep("step", step=seq)) for seq in range(4)]
    assembler = wire.Assembler([0])
    order = [steps[0], steps[2], steps[1], steps[2], steps[3]]
    told = [item for step in order for item in assembler.add(step)]
    assert told == [steps[0], steps[2], steps[3]]


def test_the_last_event_counts_when_it_is_of_the_highest_attempt() -> None:
    assembler = wire.Assembler([0])
    for attempt in (2, 1, 3):
        assembler.add(wire.End(9, attempt, attempt, 0, 0))
    assert assembler.end == wire.End(9, 3, 3, 0, 0)


def test_random_bytes_as_events_never_do_more_than_raise_our_error() -> None:
    chance = random.Random(7)
    for _ in range(300):
        raw = {**wire.encode_event(chance.choice(EVENTS))}
        raw[chance.choice(list(raw))] = chance.choice([None, -1, "x", [], {}, 1.5, True, 10**9])
        assembler = wire.Assembler([0])
        try:
            assembler.add(raw)
        except ServerResponseError:
            continue
        assert len(assembler.missing()) < 100


def test_the_request_id_is_taken_as_it_is_written() -> None:
    with pytest.raises(WorkflowRejectedError, match="request_id"):
        wire.decode_document(raw_document(request_id=str(uuid.uuid4()).upper()))
