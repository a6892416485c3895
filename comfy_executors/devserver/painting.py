"""Small deterministic pictures that stand in for what a diffusion model would make."""

from __future__ import annotations

import hashlib
import random

from PIL import Image, ImageDraw, ImageFont

_NOTICE = "placeholder - dev server"
_GRADIENT_COLOURS = 4
_SHAPES = 6
_MARGIN = 6
_LINE_HEIGHT = 14
_LETTER_WIDTH = 7
_SMALLEST_WITH_TEXT = 96
_FONT = ImageFont.load_default()


def paint(seed: int, index: int, text: str, width: int, height: int) -> Image.Image:
    """Paint the picture that a seed, a place in the batch and a text stand for.

    Args:
        seed: The seed of the sampler.
        index: The place in the batch, from 0.
        text: The text of the positive prompt; its beginning is written on the picture.
        width: In pixels.
        height: In pixels.

    Returns:
        An RGB image, the same one for the same arguments.
    """
    digest = hashlib.sha256(f"{seed}/{index}/{text}".encode("utf-8", "replace")).digest()
    source = random.Random(digest)
    strip = Image.frombytes("RGB", (_GRADIENT_COLOURS, 1), source.randbytes(3 * _GRADIENT_COLOURS))
    # Rows that are all the same are cheap to paint and to compress, at any size.
    picture = strip.resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(_SHAPES):
        _draw_shape(draw, source, width, height)
    if min(width, height) >= _SMALLEST_WITH_TEXT:
        _write(draw, [_NOTICE, f"seed {seed}, image {index}", text], width, height)
    return picture


def _draw_shape(draw: ImageDraw.ImageDraw, source: random.Random, width: int, height: int) -> None:
    size = max(1, min(width, height) // 4)
    x, y = source.randrange(width), source.randrange(height)
    box = (x - size, y - size // 2, x + size, y + size // 2)
    colour = (source.randrange(256), source.randrange(256), source.randrange(256))
    if source.random() < 0.5:
        draw.ellipse(box, fill=colour)
    else:
        draw.rectangle(box, fill=colour)


def _write(draw: ImageDraw.ImageDraw, lines: list[str], width: int, height: int) -> None:
    top = height - _MARGIN - _LINE_HEIGHT * len(lines)
    draw.rectangle((0, top - _MARGIN, width, height), fill=(16, 16, 16))
    letters = max(1, (width - 2 * _MARGIN) // _LETTER_WIDTH)
    for number, line in enumerate(lines):
        # The built-in font may know Latin letters only.
        shown = " ".join(line.encode("latin-1", "replace").decode("latin-1").split())[:letters]
        draw.text((_MARGIN, top + number * _LINE_HEIGHT), shown, fill=(235, 235, 235), font=_FONT)


def noise(seed: int, index: int, width: int, height: int) -> Image.Image:
    """Return seeded noise, which no compression makes smaller.

    Args:
        seed: The seed.
        index: The place in the batch, from 0.
        width: In pixels.
        height: In pixels.
    """
    data = random.Random(f"{seed}/{index}").randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), data)
