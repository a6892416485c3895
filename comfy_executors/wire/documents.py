"""The job document: what a worker is asked to do."""

from __future__ import annotations

import base64
import binascii
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.errors import InputImageError, WorkflowRejectedError

VERSION = 1
# Of the document in a RunPod request: a key that the official worker does not look at.
DOCUMENT_KEY = "comfy_executors"
SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SEED = 2**64 - 1
_MAX_NAME_BYTES = 200
_UNSAFE_NAME = re.compile(r"[/\\\x00-\x1f\x7f]|^\.+$")


@dataclass(frozen=True)
class JobGraph:
    """One batch of a job.

    Args:
        batch: Its place in the run, from 0.
        size: How many images it makes at the most.
        seed: The seed of its graph, or None where the graph's own seeds stay.
        graph: The graph, ready to be run.
    """

    batch: int
    size: int
    seed: int | None
    graph: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class InputFile:
    """A file that the graphs read from ComfyUI's input folder.

    Args:
        name: Its name there, without a folder.
        data: Its bytes; or
        url: where the worker gets them; or
        sha256: their digest, under which the worker was given them before.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)  # a presigned one is as good as a key
    sha256: str | None = None


@dataclass(frozen=True)
class JobOptions:
    """What goes for all batches of a job.

    Args:
        include_previews: Whether outputs of type `temp` are wanted too.
        allow_partial: Whether a graph of which ComfyUI refuses some outputs may run.
        batch_timeout: Seconds that one batch may execute, or None.
        progress: Whether somebody looks at the progress; otherwise little of it is told.
    """

    include_previews: bool = False
    allow_partial: bool = False
    batch_timeout: float | None = None
    progress: bool = True


@dataclass(frozen=True)
class JobDocument:
    """A whole job.

    Args:
        request_id: Our own UUID of the job, by which a worker knows it again.
        graphs: The batches, in order.
        input_images: The files that the graphs read.
        options: What goes for all batches.
    """

    request_id: str
    graphs: tuple[JobGraph, ...]
    input_images: tuple[InputFile, ...] = ()
    options: JobOptions = JobOptions()


def encode_document(document: JobDocument, *, inline: bool = True) -> dict[str, Any]:
    """Make JSON of a document.

    Args:
        document: The document.
        inline: Whether the bytes of input images are in it, in base64; otherwise only their names.
    """
    return {
        "version": VERSION,
        "request_id": document.request_id,
        "graphs": [
            {"batch": item.batch, "size": item.size, "seed": item.seed, "graph": item.graph}
            for item in document.graphs
        ],
        "input_images": [_encode_file(file, inline) for file in document.input_images],
        "options": {
            "include_previews": document.options.include_previews,
            "allow_partial": document.options.allow_partial,
            "batch_timeout": document.options.batch_timeout,
            "progress": document.options.progress,
        },
    }


def _encode_file(file: InputFile, inline: bool) -> dict[str, Any]:
    if file.url is not None:
        return {"name": file.name, "url": file.url}
    if file.sha256 is not None:
        return {"name": file.name, "sha256": file.sha256}
    if inline and file.data is not None:
        return {"name": file.name, "data": base64.b64encode(file.data).decode()}
    return {"name": file.name}


def encode_request(
    document: JobDocument, joined: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make the `input` of a RunPod request, which names each image's bytes once.

    Args:
        document: The document.
        joined: The graph for the official worker, or None for a request to our worker only.
    """
    request: dict[str, Any] = {DOCUMENT_KEY: encode_document(document, inline=False)}
    if joined is not None:
        request["workflow"] = joined
    images = [
        {"name": file.name, "image": base64.b64encode(file.data).decode()}
        for file in document.input_images
        if file.data is not None
    ]
    if images:
        request["images"] = images
    return request


def decode_request(request: Mapping[str, Any]) -> JobDocument:
    """Read the `input` of a RunPod request that has a document.

    Raises:
        WorkflowRejectedError: It is no job document, or one of another version.
        InputImageError: An input image has no bytes, broken base64 or a name with a folder.
    """
    images: dict[str, Any] = {}
    for item in _list(request.get("images"), "images"):
        if not isinstance(item, Mapping):
            raise _refusal("images must be a list of objects with name and image")
        images[str(item.get("name"))] = item.get("image")
    return decode_document(request.get(DOCUMENT_KEY), images)


def decode_document(raw: Any, images: Mapping[str, Any] | None = None) -> JobDocument:
    """Read a job document from JSON; what it does not know in it, it leaves alone.

    Args:
        raw: The JSON.
        images: Base64 by name, for input images that are only named in the document.

    Raises:
        WorkflowRejectedError: It is no job document, or one of another version.
        InputImageError: An input image has no bytes, broken base64 or a name with a folder.
    """
    if not isinstance(raw, Mapping):
        raise _refusal("a job document must be an object")
    if raw.get("version") != VERSION:
        raise WorkflowRejectedError(
            (),
            f"this worker reads job documents of version {VERSION}, not "
            f"{_shown(raw.get('version'))}: bring comfy-executors here and there to one version",
            kind="unsupported_version",
        )
    graphs = tuple(_graph(item) for item in _list(raw.get("graphs"), "graphs"))
    if not graphs:
        raise _refusal("a job document needs at least one graph")
    if len({item.batch for item in graphs}) != len(graphs):
        raise _refusal("two graphs have the same batch number")
    files = [_file(item, images or {}) for item in _list(raw.get("input_images"), "input_images")]
    if len({file.name for file in files}) != len(files):
        raise InputImageError("two input images have the same name")
    return JobDocument(_request_id(raw), graphs, tuple(files), _options(raw.get("options")))


def _refusal(message: str) -> WorkflowRejectedError:
    return WorkflowRejectedError((), message, kind="bad_job_document")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _list(value: Any, name: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _refusal(f"{name} must be a list, not {_shown(value)}")
    return value


def _request_id(raw: Mapping[str, Any]) -> str:
    text = raw.get("request_id")
    try:
        known = isinstance(text, str) and str(uuid.UUID(text)) == text
    except ValueError:
        known = False
    if not known:
        raise _refusal(f"request_id must be a UUID in lower case, not {_shown(text)}")
    return str(text)


def _graph(raw: Any) -> JobGraph:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("graph"), dict):
        raise _refusal("each of graphs must be an object with batch, size, seed and graph")
    seed = raw.get("seed")
    return JobGraph(
        batch=_whole(raw.get("batch"), "batch", 0),
        size=_whole(raw.get("size"), "size", 1),
        seed=None if seed is None else _whole(seed, "seed", 0),
        graph=raw["graph"],
    )


def _whole(value: Any, name: str, least: int) -> int:
    if type(value) is not int or not least <= value <= _MAX_SEED:
        raise _refusal(f"{name} must be a whole number from {least}, not {_shown(value)}")
    return value


def _file(raw: Any, images: Mapping[str, Any]) -> InputFile:
    name = raw.get("name") if isinstance(raw, Mapping) else None
    if not isinstance(name, str) or not _is_flat(name):
        raise InputImageError(
            f"{_shown(name)} is no name for an input image: a file name without folders is needed"
        )
    url, data = raw.get("url"), raw.get("data", images.get(name))
    if url is not None:
        if not isinstance(url, str):
            raise InputImageError(f"the url of the input image {name} is not a string")
        return InputFile(name, url=url)
    sha256 = raw.get("sha256")
    if sha256 is not None:
        if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise InputImageError(f"the sha256 of the input image {name} is no digest")
        return InputFile(name, sha256=sha256)
    if data is None:
        raise InputImageError(f"the input image {name} has neither bytes nor a url")
    return InputFile(name, decode_base64(data, name))


def _is_flat(name: str) -> bool:
    size = len(name.encode("utf-8", "replace"))
    return 0 < size <= _MAX_NAME_BYTES and not _UNSAFE_NAME.search(name)


def decode_base64(data: Any, name: str) -> bytes:
    """Read the base64 of a file; a data URI's head and line breaks are left out.

    Raises:
        InputImageError: It is no base64, or empty.
    """
    if not isinstance(data, str):
        raise InputImageError(f"the input image {name} must be a string in base64")
    text = data.split(",", 1)[1] if data.startswith("data:") and "," in data else data
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputImageError(f"the input image {name} is not base64: {error}") from error
    if not decoded:
        raise InputImageError(f"the input image {name} is empty")
    return decoded


def _options(raw: Any) -> JobOptions:
    options = {} if raw is None else raw
    if not isinstance(options, Mapping):
        raise _refusal(f"options must be an object, not {_shown(raw)}")
    defaults = {"include_previews": False, "allow_partial": False, "progress": True}
    flags = {name: options.get(name, default) for name, default in defaults.items()}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise _refusal(f"{name} must be true or false, not {_shown(value)}")
    timeout = options.get("batch_timeout")
    if timeout is not None:
        is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if not is_number or not 0 < timeout < math.inf:
            raise _refusal(f"batch_timeout must be seconds above 0, not {_shown(timeout)}")
    return JobOptions(**flags, batch_timeout=timeout)
