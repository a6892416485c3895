"""Nodes that make and change images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageFilter, ImageOps

from comfy_executors.devserver.files import Folders, UnsafePathError, inside
from comfy_executors.devserver.nodes import Images, NodeContext, NodeResult, fingerprint, node

_RESAMPLING = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"}


@node("EmptyImage")
def empty_image(
    context: NodeContext, width: int, height: int, batch_size: int, color: int
) -> NodeResult:
    rgb = (color >> 16 & 255, color >> 8 & 255, color & 255)
    return NodeResult(([Image.new("RGB", (width, height), rgb)] * batch_size,))


def _load(path: Path) -> tuple[Image.Image, Image.Image]:
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        assert image is not None
        if "A" in image.getbands():
            # A mask is where the picture is transparent.
            mask = ImageOps.invert(image.getchannel("A"))
        else:
            mask = Image.new("L", image.size)
        return image.convert("RGB"), mask


@node("LoadImage")
def load_image(context: NodeContext, image: str) -> NodeResult:
    loaded, mask = _load(context.folders.annotated(image))
    return NodeResult(([loaded], [mask]))


@node("LoadImageMask")
def load_image_mask(context: NodeContext, image: str, channel: str) -> NodeResult:
    path = context.folders.annotated(image)
    loaded, mask = _load(path)
    if channel == "alpha":
        return NodeResult(([mask],))
    return NodeResult(([loaded.getchannel(channel[0].upper())],))


@fingerprint("LoadImage")
@fingerprint("LoadImageMask")
def _file_fingerprint(folders: Folders, inputs: Mapping[str, Any]) -> str:
    return _digest([folders.annotated(inputs["image"])])


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0".encode("utf-8", "surrogateescape"))
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _images_in(folders: Folders, inputs: Mapping[str, Any]) -> list[Path]:
    directory = str(inputs["directory"])
    try:
        folder = inside(folders.root, directory)
    except UnsafePathError as error:
        raise FileNotFoundError(f"Directory '{directory}' cannot be found.") from error
    if not folder.is_dir():
        raise FileNotFoundError(f"Directory '{directory}' cannot be found.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    start = int(inputs.get("start_index", 0))
    cap = int(inputs.get("image_load_cap", 0))
    return paths[start : start + cap if cap else None]


@node("LoadImagesFromDir")
def load_images_from_dir(context: NodeContext, **inputs: Any) -> NodeResult:
    paths = _images_in(context.folders, inputs)
    if not paths:
        raise FileNotFoundError(f"No files in directory '{inputs['directory']}'.")
    loaded = [_load(path) for path in paths]
    size = loaded[0][0].size
    images = [image if image.size == size else image.resize(size) for image, _ in loaded]
    masks = [mask if mask.size == size else mask.resize(size) for _, mask in loaded]
    return NodeResult((images, masks, len(images)))


@fingerprint("LoadImagesFromDir")
def _folder_fingerprint(folders: Folders, inputs: Mapping[str, Any]) -> str:
    return _digest(_images_in(folders, inputs))


def resized(image: Image.Image, method: str, width: int, height: int, crop: str) -> Image.Image:
    """Resize an image; a width or height of 0 pixels follows from the other one."""
    if width == 0 and height == 0:
        return image
    width = width or max(1, round(image.width * height / image.height))
    height = height or max(1, round(image.height * width / image.width))
    resampling = _RESAMPLING.get(method, Image.Resampling.BICUBIC)
    if crop == "center":
        return ImageOps.fit(image, (width, height), resampling)
    return image.resize((width, height), resampling)


@node("ImageScale")
def image_scale(
    context: NodeContext, image: Images, upscale_method: str, width: int, height: int, crop: str
) -> NodeResult:
    return NodeResult(([resized(one, upscale_method, width, height, crop) for one in image],))


@node("ImageScaleBy")
def image_scale_by(
    context: NodeContext, image: Images, upscale_method: str, scale_by: float
) -> NodeResult:
    width = max(1, round(image[0].width * scale_by))
    height = max(1, round(image[0].height * scale_by))
    return NodeResult(([resized(one, upscale_method, width, height, "disabled") for one in image],))


@node("ImageInvert")
def image_invert(context: NodeContext, image: Images) -> NodeResult:
    return NodeResult(([ImageOps.invert(one) for one in image],))


@node("ImageBatch")
def image_batch(context: NodeContext, image1: Images, image2: Images) -> NodeResult:
    size = image1[0].size
    second = [one if one.size == size else ImageOps.fit(one, size) for one in image2]
    return NodeResult(([*image1, *second],))


@node("ImageCrop")
def image_crop(
    context: NodeContext, image: Images, width: int, height: int, x: int, y: int
) -> NodeResult:
    x, y = min(x, image[0].width - 1), min(y, image[0].height - 1)
    right, bottom = min(x + width, image[0].width), min(y + height, image[0].height)
    return NodeResult(([one.crop((x, y, right, bottom)) for one in image],))


@node("ImageBlur")
def image_blur(context: NodeContext, image: Images, blur_radius: int, sigma: float) -> NodeResult:
    blur = ImageFilter.GaussianBlur(min(float(blur_radius), sigma))
    return NodeResult(([one.filter(blur) for one in image],))


@node("ImageBlend")
def image_blend(
    context: NodeContext, image1: Images, image2: Images, blend_factor: float, blend_mode: str
) -> NodeResult:
    modes = {
        "multiply": ImageChops.multiply,
        "screen": ImageChops.screen,
        "overlay": ImageChops.overlay,
        "soft_light": ImageChops.soft_light,
        "difference": ImageChops.difference,
    }
    blended = []
    for first, second in zip(image1, image2):
        top = second if second.size == first.size else ImageOps.fit(second, first.size)
        mixed = modes[blend_mode](first, top) if blend_mode in modes else top
        blended.append(Image.blend(first, mixed, blend_factor))
    return NodeResult((blended,))


@node("RepeatImageBatch")
def repeat_image_batch(context: NodeContext, image: Images, amount: int) -> NodeResult:
    return NodeResult((image * amount,))


@node("ImageFromBatch")
def image_from_batch(
    context: NodeContext, image: Images, batch_index: int, length: int
) -> NodeResult:
    start = batch_index + len(image) if batch_index < 0 else batch_index
    start = min(max(start, 0), len(image) - 1)
    return NodeResult((image[start : start + length],))
