"""An executor without a server, for tests and dry runs: the smallest example of a backend."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_executors.errors import InputImageError, MissingExtraError
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.control import JobControl
from comfy_executors.images import WorkflowOutputImage, kind_of
from comfy_executors.runs import BatchResult, Job

if TYPE_CHECKING:
    from PIL import Image


class DummyWorkflowExecutor(BaseWorkflowExecutor):
    """Answer each workflow with images of a folder, or with one plain image.

    Templates are rendered and checked as for a server; which image comes is drawn by the batch's
    seed, so that `seed=` gives the same images again.

    Args:
        image_folder: A folder with images; None makes one plain image.
        image_size: The side of that plain image in pixels.
        batch_size: How many images one batch has, for templates that say `batch_size`.
        fallback_fill_color: The plain image's colour, as red, green and blue from 0 to 255.
        max_workers: How many batches are worked on at once.

    Raises:
        MissingExtraError: Pillow is not installed.
        InputImageError: The folder has no images, or one of them cannot be opened.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike[str] | None = None,
        image_size: int = 512,
        batch_size: int = 1,
        fallback_fill_color: tuple[int, int, int] = (255, 255, 255),
        *,
        max_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, max_workers=max_workers)
        self.image_size = image_size
        self.fallback_fill_color = fallback_fill_color
        self.images = self._load(image_folder) if image_folder else [self.create_dummy_image()]
        self._encoded = [_encode(image) for image in self.images]

    def create_dummy_image(self) -> Image.Image:
        """Make the plain image."""
        size = (self.image_size, self.image_size)
        image: Image.Image = _pillow().new("RGB", size, self.fallback_fill_color)
        return image

    def _load(self, folder: str | os.PathLike[str]) -> list[Image.Image]:
        pillow, images = _pillow(), []
        for path in sorted(Path(folder).glob("*")):
            if kind_of(path.name) == "image":
                try:
                    with pillow.open(path) as image:
                        images.append(image.copy())
                except OSError as error:
                    raise InputImageError(f"Pillow cannot open {path}: {error}") from error
        if not images:
            raise InputImageError(f"there is no image in {os.fspath(folder)}")
        return images

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
        for batch in job.batches:
            control.begin(batch)
            draw = random.Random(batch.seed)
            batch.render(batch)  # what is wrong with a template shows here, too
            images = [
                WorkflowOutputImage(
                    draw.choice(self._encoded),
                    name=f"{batch.index:03d}_{number:03d}.png",
                    node_id="dummy",
                    batch_index=batch.index,
                    seed=batch.seed,
                )
                for number in range(batch.size)
            ]
            yield BatchResult(batch.index, images, seed=batch.seed)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "pillow") from error
    return Image


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
