"""What the RunPod and Modal executors and our workers say to each other: jobs one way, events back.

A job document names the graphs of a job and its input images. The worker answers with numbered
events; a job that runs twice, chunks that are lost, repeated or out of order are all expected.
"""

from __future__ import annotations

from comfy_executors.wire.assembler import (
    Assembler,
    CompleteBatch,
    Missing,
    News,
    WholeOutput,
)
from comfy_executors.wire.documents import (
    DOCUMENT_KEY,
    SHA256,
    VERSION,
    InputFile,
    JobDocument,
    JobGraph,
    JobOptions,
    decode_base64,
    decode_document,
    decode_request,
    encode_document,
    encode_request,
)
from comfy_executors.wire.events import (
    PART_BYTES,
    BatchEnded,
    End,
    Event,
    Failed,
    OutputPart,
    Progress,
    ProgressStep,
    Started,
    decode_event,
    encode_event,
    is_of_unknown_kind,
    split,
)
from comfy_executors.wire.failures import decode_error, encode_error

__all__ = [
    "DOCUMENT_KEY",
    "PART_BYTES",
    "SHA256",
    "VERSION",
    "Assembler",
    "BatchEnded",
    "CompleteBatch",
    "End",
    "Event",
    "Failed",
    "InputFile",
    "JobDocument",
    "JobGraph",
    "JobOptions",
    "Missing",
    "News",
    "OutputPart",
    "Progress",
    "ProgressStep",
    "Started",
    "WholeOutput",
    "decode_base64",
    "decode_document",
    "decode_error",
    "decode_event",
    "decode_request",
    "encode_document",
    "encode_error",
    "encode_event",
    "encode_request",
    "is_of_unknown_kind",
    "split",
]
