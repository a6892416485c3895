"""From a call's arguments to batches: sizes, seeds, variables, graphs. Nothing is sent here."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_executors.errors import GraphError, InputImageError, TemplateVariablesError
from comfy_executors.graphs import class_type, find_linked_seed, whole_number
from comfy_executors.images import InputImageSet
from comfy_executors.runs import Batch
from comfy_executors.workflows import (
    Graph,
    WorkflowTemplate,
    find_seeds,
    node_title,
    output_nodes,
    plan_batches,
    set_seeds,
)

logger = logging.getLogger(__name__)

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
        input_images_dir: The folder of the input images as the server's nodes take it; None where
            they have none of their own.

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
        input_images_dir: str | None,
    ) -> None:
        self._template = template
        self._wants = template.variables
        self._variables = dict(variables)
        sets_seed = seed is not None or randomize_seed
        self._refuse_variables("batch_size", *(["seed"] if sets_seed else []))
        if input_images is not None:
            self._add_input_images(input_images, input_images_dir)
        self._rendered: dict[int, Graph] = {}
        batch_size = whole_number("batch_size", batch_size, 1)
        sizes = plan_batches(num_samples, batch_size if "batch_size" in self._wants else 1)
        seeds: Sequence[int | None] = _draw_seeds(len(sizes), seed, randomize_seed)
        for size in {sizes[0], sizes[-1]}:
            self.graph = self._render(size, seeds[0])
        self.seeded = sets_seed and ("seed" in self._wants or bool(find_seeds(self.graph)))
        self._misses_seed = sets_seed and not self.seeded and (seed is not None or len(sizes) > 1)
        if not self.seeded:
            seeds = [None] * len(sizes)
        self.batches = [
            Batch(index, size, seeds[index], self.render) for index, size in enumerate(sizes)
        ]

    def render(self, batch: Batch) -> Graph:
        """Make the graph of one batch; it may share nodes with others and is not to be changed."""
        graph = self._render(batch.size, batch.seed)
        return graph if batch.seed is None else set_seeds(graph, batch.seed)

    def _render(self, size: int, seed: int | None) -> Graph:
        # Once a batch size where that will do: a run has thousands of batches and two sizes.
        if size in self._rendered:
            return self._rendered[size]
        variables = dict(self._variables)
        if "batch_size" in self._wants:
            variables["batch_size"] = size
        if "seed" in self._wants and seed is not None:
            variables["seed"] = seed
        try:
            graph = self._template.render(**variables)
        except TemplateVariablesError as error:
            raise _with_arguments(error) from error
        if "seed" not in self._wants:
            self._rendered[size] = graph
        return graph

    def warn(self) -> None:
        """Log what is allowed and hardly wanted.

        That is a seed that cannot be set, identical batches, and more images than said.
        """
        linked = find_linked_seed(self.graph) if self._misses_seed else None
        if linked is not None:
            logger.warning(
                "no seed was set: node %s takes its own from node %s (%s); write {{ seed }} there",
                *linked,
                class_type(self.graph, linked[1]),
            )
        if len(self.batches) > 1 and not self.seeded:
            logger.warning(
                "the %d batches have the same seeds: a server answers all but the first from its "
                "cache, with the same images",
                len(self.batches),
            )
        for node_id, node in self.graph.items():
            size = node["inputs"].get("batch_size")
            if "batch_size" not in self._wants and type(size) is int and size > 1:
                logger.warning(
                    "node %s makes %d images at once and the template has no {{ batch_size }}: "
                    "expect %d images, not %d",
                    node_id,
                    size,
                    size * len(self.batches),
                    len(self.batches),
                )

    def _add_input_images(self, images: InputImageSet, folder: str | None) -> None:
        if folder is None and "input_images_dir" in self._wants:
            raise InputImageError(
                "this executor's input images have no folder of their own: let the template use "
                "their names, input_images, instead of input_images_dir"
            )
        given = {"input_images_dir": folder, "input_images": images.names}
        wanted = {name: value for name, value in given.items() if name in self._wants}
        if not wanted:
            raise InputImageError(
                f"{len(images)} input images were given, but the template uses neither "
                "input_images nor input_images_dir"
            )
        self._refuse_variables(*wanted)
        self._variables.update(wanted)

    def _refuse_variables(self, *names: str) -> None:
        """Raise ValueError for what is set here and would silently win over what was given."""
        for name in names:
            if name in self._wants and name in self._variables:
                raise ValueError(f"{name} is an argument of its own and no variable: pass {name}=")


def _with_arguments(error: TemplateVariablesError) -> TemplateVariablesError:
    """Say of missing variables that stand for arguments how these are called."""
    arguments = {"input_images": "input_images=[…]", "input_images_dir": "input_images=[…]"}
    arguments["seed"] = "seed=, or leave randomize_seed on"
    hints = {arguments[name] for name in error.missing if name in arguments}
    message = "; ".join([error.message, *(f"pass {hint}" for hint in sorted(hints))])
    return TemplateVariablesError(
        message,
        missing=error.missing,
        unknown=error.unknown,
        known=error.known,
        source=error.source,
    )


def _draw_seeds(count: int, seed: int | None, randomize: bool) -> Sequence[int | None]:
    if seed is not None:
        seed = whole_number("seed", seed, 0)
        if seed + count - 1 > _MAX_SEED:
            raise ValueError(f"seed {seed} + {count - 1} is above {_MAX_SEED}")
        return range(seed, seed + count)
    # Without repetition: two batches with one seed would make the same images.
    return _random.sample(range(_RANDOM_SEEDS), count) if randomize else [None] * count


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
