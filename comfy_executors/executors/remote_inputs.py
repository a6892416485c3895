"""Input images as the workers of serverless backends take them: flat names, or addresses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from comfy_executors.errors import InputImageError
from comfy_executors.images import InputImageSet, InputImageSource, kind_of
from comfy_executors.wire import InputFile


class RemoteInputImageSet(InputImageSet):
    """Input images that travel with a job, or that its worker fetches.

    Args:
        sources: What `InputImage.load` takes, and https URLs as strings.

    Raises:
        InputImageError: As for `InputImageSet`.
    """

    # worker-comfyui uploads each image under the very name that it is given.
    has_folder = False

    def __init__(self, sources: Sequence[InputImageSource]) -> None:
        if isinstance(sources, str):
            raise InputImageError("input_images is a list of images: write input_images=[image]")
        urls = [_url_of(source) for source in sources]
        super().__init__([s for s, url in zip(sources, urls) if url is None])
        loaded = iter(self.files.items())
        names: dict[bytes, str] = {}  # the same bytes travel once, under one name
        inputs: list[InputFile] = []
        for url in urls:
            if url is not None:
                inputs.append(InputFile(_name_of(url), url=url))
            else:
                name, data = next(loaded)
                inputs.append(InputFile(names.setdefault(data, f"{self.folder}_{name}"), data))
        self.inputs = tuple(inputs)

    @property
    def names(self) -> list[str]:
        """The names that a `LoadImage` node takes."""
        return [file.name for file in self.inputs]

    @property
    def unique(self) -> tuple[InputFile, ...]:
        """The files, each once."""
        return tuple({file.name: file for file in self.inputs}.values())

    def __len__(self) -> int:
        return len(self.inputs)


def _url_of(source: InputImageSource) -> str | None:
    is_url = isinstance(source, str) and source.lower().startswith(("http://", "https://"))
    if is_url and not str(source).lower().startswith("https://"):
        raise InputImageError("the URL of an input image begins with https://")
    return str(source) if is_url else None


def _name_of(url: str) -> str:
    suffix = os.path.splitext(urlsplit(url).path)[1].lower()
    suffix = suffix if kind_of(f"x{suffix}") == "image" else ".png"
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}{suffix}"
