"""Nodes that report results, and the small ones for text and numbers."""

from __future__ import annotations

import io
import itertools
import json
import random
import string
import struct
from collections.abc import Mapping
from typing import Any

from PIL import Image

from comfy_executors.devserver.files import Folders
from comfy_executors.devserver.nodes import Images, NodeContext, NodeResult, fingerprint, node
from comfy_executors.devserver.png import png

_TEMP_PREFIX = "ComfyUI_temp_" + "".join(random.choices(string.ascii_lowercase, k=5))
_WEBP_METHODS = {"default": 4, "fastest": 0, "slowest": 6}
# The header of a WebM file with an empty segment: recognised as a video, with nothing to play.
_WEBM = bytes.fromhex(
    "1a45dfa39f4286810142f7810142f2810442f381084282847765626d42878102428581021853806780"
)
_executions = itertools.count()


def _texts(context: NodeContext) -> dict[str, str]:
    extra = context.extra_data.get("extra_pnginfo")
    texts = {"prompt": json.dumps(context.graph)}
    if isinstance(extra, dict):
        texts.update({str(key): json.dumps(value) for key, value in extra.items()})
    return texts


def _save_images(context: NodeContext, images: Images, folder_type: str, prefix: str) -> NodeResult:
    texts = _texts(context)
    files = [
        context.folders.write(folder_type, prefix, png(image, texts), "_.png") for image in images
    ]
    return NodeResult((images,), {"images": files})


@node("SaveImage")
def save_image(
    context: NodeContext, images: Images, filename_prefix: str = "ComfyUI"
) -> NodeResult:
    return _save_images(context, images, "output", filename_prefix)


@node("PreviewImage")
def preview_image(context: NodeContext, images: Images) -> NodeResult:
    return _save_images(context, images, "temp", _TEMP_PREFIX)


@node("SaveImageWebsocket")
def save_image_websocket(context: NodeContext, images: Images) -> NodeResult:
    for index, image in enumerate(images):
        context.progress(index, len(images), (png(image), "image/png"))
    return NodeResult()


@fingerprint("SaveImageWebsocket")
def _never_the_same(folders: Folders, inputs: Mapping[str, Any]) -> str:
    return str(next(_executions))


def _animated(
    context: NodeContext, images: Images, prefix: str, data: bytes, suffix: str
) -> NodeResult:
    file = context.folders.write("output", prefix, data, suffix)
    return NodeResult((images,), {"images": [file], "animated": [True]})


@node("SaveAnimatedWEBP")
def save_animated_webp(
    context: NodeContext,
    images: Images,
    filename_prefix: str,
    fps: float,
    lossless: bool,
    quality: int,
    method: str,
) -> NodeResult:
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        lossless=lossless,
        quality=quality,
        method=_WEBP_METHODS[method],
    )
    return _animated(context, images, filename_prefix, buffer.getvalue(), "_.webp")


@node("SaveAnimatedPNG")
def save_animated_png(
    context: NodeContext, images: Images, filename_prefix: str, fps: float, compress_level: int
) -> NodeResult:
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "PNG",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        compress_level=compress_level,
    )
    return _animated(context, images, filename_prefix, buffer.getvalue(), "_.png")


@node("SaveWEBM")
def save_webm(
    context: NodeContext, images: Images, filename_prefix: str, **options: Any
) -> NodeResult:
    return _animated(context, images, filename_prefix, _WEBM, "_.webm")


@node("EmptyAudio")
def empty_audio(
    context: NodeContext, duration: float, sample_rate: int = 44100, channels: int = 2
) -> NodeResult:
    return NodeResult(((round(duration * sample_rate), sample_rate, channels),))


@node("SaveAudio")
def save_audio(
    context: NodeContext, audio: tuple[int, int, int], filename_prefix: str
) -> NodeResult:
    file = context.folders.write("output", filename_prefix, _flac(*audio), ".flac")
    return NodeResult((audio,), {"audio": [file]})


def _flac(samples: int, sample_rate: int, channels: int) -> bytes:
    """Return the header of a FLAC file (STREAMINFO); it holds the facts, and no sound."""
    block_size = struct.pack(">HH", 4096, 4096)
    unknown_frame_sizes = bytes(6)
    bits_per_sample = 16
    packed = sample_rate << 44 | (channels - 1) << 41 | (bits_per_sample - 1) << 36 | samples
    checksum = bytes(16)
    info = block_size + unknown_frame_sizes + packed.to_bytes(8, "big") + checksum
    last_block_of_type_0 = b"\x80"
    return b"fLaC" + last_block_of_type_0 + len(info).to_bytes(3, "big") + info


@node("PreviewAny")
def preview_any(context: NodeContext, source: Any = None) -> NodeResult:
    text = _as_text(source)
    return NodeResult((text,), {"text": [text]})


def _as_text(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        width, height = value[0].size
        return f"{len(value)} images of {width}x{height} pixels"
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return str(value)


@node("PrimitiveInt")
@node("PrimitiveFloat")
@node("PrimitiveString")
def primitive(context: NodeContext, value: Any) -> NodeResult:
    return NodeResult((value,))


@node("StringConcatenate")
def string_concatenate(
    context: NodeContext, string_a: str, string_b: str, delimiter: str
) -> NodeResult:
    return NodeResult((delimiter.join((string_a, string_b)),))
