"""Every error: its text, its place in the tree, and its way through pickle."""

from __future__ import annotations

import concurrent.futures
import copy
import inspect
import pickle
import re
from typing import Any

import pytest

from comfy_executors import errors
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    EndpointNotFoundError,
    ExecutorClosedError,
    GraphError,
    InputImageError,
    JobError,
    JobExpiredError,
    JobInterruptedError,
    JobLostError,
    JobOutputLostError,
    JobResultLostError,
    JobTimeoutError,
    MissingExtraError,
    NodeExecutionError,
    NodeProblem,
    OutputFileError,
    OutputMissingError,
    PayloadTooLargeError,
    PromptLostError,
    ResultsTakenError,
    RunPodJobFailedError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnreachableError,
    SubmitUncertainError,
    TemplateError,
    TemplateJSONError,
    TemplateRenderError,
    TemplateSyntaxError,
    TemplateVariablesError,
    UIFormatError,
    WaitTimeoutError,
    WorkerLostError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowInterruptedError,
    WorkflowRejectedError,
    WorkflowTimeoutError,
)

MODEL = NodeProblem(
    node_id="4",
    class_type="CheckpointLoaderSimple",
    title="Load Checkpoint",
    input_name="ckpt_name",
    value="sd_xl.safetensors",
    kind="value_not_in_list",
    reason='"sd_xl.safetensors" is not on the server',
    nearest=("sd_xl_base_1.0.safetensors", "sd_xl_refiner.safetensors"),
)
UNKNOWN = NodeProblem("9", "Nope", None, None, None, "missing_node_type", "it is not installed")
PLACE: dict[str, Any] = {
    "line": 3,
    "column": 7,
    "excerpt": "  3 | {{ x }\n    |       ^",
    "source": "w.jinja",
}
SERVER: dict[str, Any] = {"transient": True, "maybe_received": False, "retry_after": 2.5}
JOB: dict[str, Any] = {"job_id": "j-1", "server": "https://h"}
PROMPT: dict[str, Any] = {"prompt_id": "p-1", "server": "http://h:8188"}

CASES: list[tuple[ComfyExecutorsError, str]] = [
    (ComfyExecutorsError(), ""),
    (ComfyExecutorsError("why"), "why"),
    (
        MissingExtraError("Pillow", "pillow"),
        "Pillow is not installed: run pip install 'comfy-executors[pillow]'",
    ),
    (ExecutorClosedError("it is closed"), "it is closed"),
    (ResultsTakenError("taken"), "taken"),
    (WaitTimeoutError("too long"), "too long"),
    (TemplateError("bad"), "bad"),
    (TemplateError("bad", source="w.jinja", line=3), "w.jinja, line 3: bad"),
    (
        TemplateSyntaxError("bad", **PLACE),
        "w.jinja, line 3, column 7: bad\n  3 | {{ x }\n    |       ^",
    ),
    (
        TemplateVariablesError("missing: x", missing=["x"], unknown=["y"], known=("x", "z")),
        "missing: x",
    ),
    (TemplateRenderError("bad", line=1), "line 1: bad"),
    (TemplateJSONError("bad", column=0), "column 0: bad"),
    (GraphError("no class_type", node_id="3"), "no class_type"),
    (UIFormatError("UI format"), "UI format"),
    (InputImageError("no image"), "no image"),
    (OutputFileError("disk full"), "disk full"),
    (ServerError("odd", "http://h:8188", 418, **SERVER), "odd"),
    (ServerUnreachableError("nobody", "http://h:8188"), "nobody"),
    (ServerNotReadyError("not yet", "http://h:8188", transient=True), "not yet"),
    (AuthenticationError("who are you", "http://h:8188", 401), "who are you"),
    (ServerResponseError("HTML", "http://h:8188", 200, retry_after=1.0), "HTML"),
    (WorkflowError("failed", **PROMPT), "failed"),
    (
        WorkflowRejectedError([MODEL, UNKNOWN], "invalid", kind="k", **PROMPT),
        'Node 4 "Load Checkpoint" (CheckpointLoaderSimple), input ckpt_name: "sd_xl.safetensors" '
        "is not on the server; nearest: sd_xl_base_1.0.safetensors, sd_xl_refiner.safetensors\n"
        "Node 9 (Nope): it is not installed",
    ),
    (WorkflowRejectedError([], "no outputs"), "the server refused the workflow: no outputs"),
    (WorkflowRejectedError([], kind="k"), "the server refused the workflow: k"),
    (
        NodeExecutionError(
            node_id="3",
            class_type="KSampler",
            title=None,
            exception_type="RuntimeError",
            exception_message="out of memory",
            traceback="  File ...",
            **PROMPT,
        ),
        "Node 3 (KSampler) failed: RuntimeError: out of memory",
    ),
    (WorkflowInterruptedError("interrupted", **PROMPT), "interrupted"),
    (WorkflowTimeoutError("the batch_timeout of 5 s passed"), "the batch_timeout of 5 s passed"),
    (WorkflowCancelledError("the run was cancelled"), "the run was cancelled"),
    (PromptLostError("lost", **PROMPT), "lost"),
    (EndpointNotFoundError("no endpoint", "https://h", 404), "no endpoint"),
    (PayloadTooLargeError("too large", size=11, limit=10, server="https://h"), "too large"),
    (JobError("failed"), "failed"),
    (JobError("failed", job_id="j-1"), "job j-1: failed"),
    (SubmitUncertainError("who knows", request_id="r-1"), "who knows"),
    (
        RunPodJobFailedError(
            "no memory", exception_type="E", details=["a", "b"], worker_id="w", **JOB
        ),
        "job j-1: failed: E: no memory; a; b",
    ),
    (JobTimeoutError("too slow", started=True, **JOB), "job j-1: too slow"),
    (JobInterruptedError("stopped", **JOB), "job j-1: stopped"),
    (WorkerLostError("died", retries=2, worker_id="w", **JOB), "job j-1: died"),
    (JobResultLostError("nothing", **JOB), "job j-1: nothing"),
    (JobLostError("forgotten", **JOB), "job j-1: forgotten"),
    (JobExpiredError("expired", **JOB), "job j-1: expired"),
    (JobOutputLostError("parts missing", **JOB), "job j-1: parts missing"),
    (OutputMissingError("gone", cached=True, node_id="9", **PROMPT), "gone"),
]

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, ComfyExecutorsError)
]


def name_of(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, Exception) else None


@pytest.mark.parametrize(("error", "text"), CASES, ids=name_of)
def test_text(error: ComfyExecutorsError, text: str) -> None:
    assert str(error) == text


def test_every_class_is_in_the_list_above() -> None:
    assert {type(error) for error, _ in CASES} == set(CLASSES)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
@pytest.mark.parametrize(("error", "text"), CASES, ids=name_of)
def test_copies_and_pickles_keep_every_attribute(
    error: ComfyExecutorsError, text: str, again: Any
) -> None:
    if isinstance(error, WorkflowError):
        error.batch_index = 5
    twin = again(error)
    assert type(twin) is type(error)
    assert vars(twin) == vars(error)
    assert (str(twin), repr(twin)) == (text, f"{type(error).__name__}({text!r})")


def test_the_attributes_are_what_was_given() -> None:
    given = {str(type(error).__name__): vars(error) for error, _ in CASES}
    assert given["MissingExtraError"].items() >= {"package": "Pillow", "extra": "pillow"}.items()
    assert given["TemplateSyntaxError"].items() >= PLACE.items()
    variables = {"missing": ("x",), "unknown": ("y",), "known": ("x", "z"), "source": None}
    assert given["TemplateVariablesError"].items() >= variables.items()
    assert given["ServerError"].items() >= {**SERVER, "status": 418}.items()
    assert given["NodeExecutionError"].items() >= {**PROMPT, "traceback": "  File ..."}.items()
    assert given["OutputMissingError"].items() >= {"cached": True, "node_id": "9"}.items()
    assert CASES[-1][0].server == PROMPT["server"]  # type: ignore[attr-defined]


def drawn_tree() -> dict[str, str]:
    """The parents of the classes that the module's docstring draws."""
    parents: dict[str, str] = {}
    path: list[str] = []
    branch = re.compile(r"^    (?:([│ ]*)([├└])── )?(\w+Error)\b", re.MULTILINE)
    for prefix, corner, name in branch.findall(errors.__doc__ or ""):
        depth = len(prefix) // 4 + 1 if corner else 0
        path[depth:] = [name]
        parents[name] = path[depth - 1] if depth else ""
    return parents


def test_the_docstring_draws_the_tree() -> None:
    real = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    real["ComfyExecutorsError"] = ""
    assert drawn_tree() == real


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_every_error_says_when_it_is_raised(cls: type[ComfyExecutorsError]) -> None:
    assert (cls.__doc__ or "").startswith("Raised when ")


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (MissingExtraError, ImportError),
        (ExecutorClosedError, RuntimeError),
        (TemplateError, ValueError),
        (GraphError, ValueError),
        (InputImageError, ValueError),
        *[
            (cls, base)
            for cls in (
                WaitTimeoutError,
                ServerNotReadyError,
                WorkflowTimeoutError,
                JobTimeoutError,
            )
            for base in (TimeoutError, concurrent.futures.TimeoutError)
        ],
        (JobInterruptedError, WorkflowInterruptedError),
        (PayloadTooLargeError, ValueError),
        (WorkflowCancelledError, concurrent.futures.CancelledError),
    ],
)
def test_errors_are_also_what_python_calls_them(cls: type, base: type) -> None:
    assert issubclass(cls, base)


@pytest.mark.parametrize("cls", [ServerNotReadyError, WaitTimeoutError, WorkflowTimeoutError])
def test_an_os_error_keeps_its_sentence(cls: type[ComfyExecutorsError]) -> None:
    error = cls("too late")
    assert (str(error), error.args, error.message) == ("too late", ("too late",), "too late")
