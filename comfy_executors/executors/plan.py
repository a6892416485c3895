"""From a call's arguments to batches: sizes, seeds, variables, graphs. Nothing is sent here."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_executors.errors import GraphError, InputImageError
from comfy_executors.images import InputImageSet
from comfy_executors.runs import Batch
from comfy_executors.workflows import (
    Graph,
    WorkflowTemplate,
    find_seeds,
    node_title,
    plan_batches,
    set_seeds,
    output_nodes,
)

# Not the `random` module's own state: forked workers would all draw the same seeds, and a caller
# who seeds it for something else would get the same images every time.
_random = random.SystemRandom()
_RANDOM_SEEDS = 2**32  # KSampler takes 64 bits, many custom nodes only 32
_MAX_SEED = 2**64 - 1


class Plan:
    """The batches of one call, and how their graphs come about.

    Args:
        template: The workflow template.
        num_samples: How many images are wanted.
        batch_size: How many images one execution makes; 1 for a template that does not say
            `batch_size`.
        seed: The seed of batch 0; batch i gets `seed + i`. None draws each at random.
        randomize_seed: Whether seeds are drawn where no `seed` is given.
        variables: What the caller gave for the template.
        input_images: The input images, or None.
        input_images_dir: The folder of the input images as the server's nodes take it.

    Raises:
        ValueError: A number is out of its range.
        TemplateError, GraphError, InputImageError: The template, or what was given for it, is
            wrong; the graph of each batch size is rendered once to find out.
    """

    def __init__(
        self,
        template: WorkflowTemplate,
        *,
        num_samples: int,
        batch_size: int,
        seed: int | None,
        randomize_seed: bool,
        variables: Mapping[str, Any],
        input_images: InputImageSet | None,
        input_images_dir: str,
    ) -> None:
        self._template = template
        self._wants = template.variables
        self._variables = dict(variables)
        if input_images is not None:
            self._add_input_images(input_images, input_images_dir)
        sizes = plan_batches(num_samples, batch_size if "batch_size" in self._wants else 1)
        seeds = _draw_seeds(len(sizes), seed, randomize_seed)
        self.batches = [
            Batch(index, size, seeds[index] if seeds else None, self.render)
            for index, size in enumerate(sizes)
        ]
        first, last = self.batches[0], self.batches[-1]
        graphs = [self.render(batch) for batch in ([first, last] if len(sizes) > 1 else [first])]
        self.graph = graphs[0]
        self.seeded = bool(seeds) and ("seed" in self._wants or bool(find_seeds(self.graph)))

    def render(self, batch: Batch) -> Graph:
        """Make the graph of one batch."""
        variables = dict(self._variables)
        if "batch_size" in self._wants:
            variables["batch_size"] = batch.size
        if batch.seed is None:
            return self._template.render(**variables)
        if "seed" in self._wants:
            variables["seed"] = batch.seed
        return set_seeds(self._template.render(**variables), batch.seed)

    def _add_input_images(self, images: InputImageSet, folder: str) -> None:
        given = {"input_images_dir": folder, "input_images": images.names}
        wanted = {name: value for name, value in given.items() if name in self._wants}
        if not wanted:
            raise InputImageError(
                f"{len(images)} input images were given, but the template uses neither "
                "input_images nor input_images_dir"
            )
        self._variables.update(wanted)


def _draw_seeds(count: int, seed: int | None, randomize: bool) -> Sequence[int]:
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed must be a whole number from 0, not {seed!r}")
        if seed + count - 1 > _MAX_SEED:
            raise ValueError(f"seed {seed} + {count - 1} is above {_MAX_SEED}")
        return range(seed, seed + count)
    # Without repetition: two batches with one seed would make the same images.
    return _random.sample(range(_RANDOM_SEEDS), count) if randomize else ()


def refuse_previews_only(graph: Graph) -> None:
    """Raise GraphError for a graph that ends in PreviewImage nodes alone: nothing would come back.

    Raises:
        GraphError: All nodes that end the graph are PreviewImage.
    """
    ends = output_nodes(graph)
    if ends and all(graph[node]["class_type"] == "PreviewImage" for node in ends):
        title = node_title(graph, ends[0])
        raise GraphError(
            f"node {ends[0]}{f' {title!r}' if title else ''} (PreviewImage) makes only previews: "
            "pass include_previews=True, or save with a SaveImage node",
            node_id=ends[0],
        )
