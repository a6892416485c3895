"""A page to look at what was made: one self-contained `index.html` beside the images."""

from __future__ import annotations

from comfy_executors.gallery.writing import write_gallery

__all__ = ["write_gallery"]
