"""Several batches in one graph, for workers that run one graph a job.

Nodes that are the same in all batches are there once, and run once; those that differ, and what
depends on them, are repeated. Each node that saves files gets a file name prefix of its own, by
which the batch and the node of a file are found again.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from comfy_executors.graphs import Graph, is_link, output_nodes
from comfy_executors.wire import JobGraph

_PREFIX_INPUT = "filename_prefix"
_DEFAULT_NAME = "ComfyUI"
_TAGGED = re.compile(r"([0-9a-f]{8}x(\d+)x\d+)_")
# What is left of an image in PNG, and four characters of base64 for three bytes.
_BYTES_PER_PIXEL = 3 * 0.7 * 4 / 3
_DEFAULT_PIXELS = 1024 * 1024
_PIXELS_PER_BYTE = 3  # of a photograph as JPEG or WebP
_MODEL_FACTOR = re.compile(r"(?<![0-9])([2-8])x|x([2-8])(?![0-9])", re.IGNORECASE)
_USUAL_FACTOR = 4
_SAVES = re.compile(r"save|write|export|output|combine|video|websocket", re.IGNORECASE)


@dataclass(frozen=True)
class Owner:
    """Whose files begin with a prefix.

    Args:
        batch: The batch.
        node_id: The node in that batch's own graph.
        subfolder: The folder that the node's own prefix names.
    """

    batch: int
    node_id: str
    subfolder: str


@dataclass(frozen=True)
class JoinedGraph:
    """One graph for several batches.

    Args:
        graph: The graph.
        batches: The batches that are in it.
        owners: By the prefix of their files, the nodes that save some.
        node_ids: By its id in the joined graph, each node's batch (None where it is shared) and
            its id in the batch's own graph.
    """

    graph: Graph = field(repr=False)
    batches: tuple[int, ...]
    owners: Mapping[str, Owner] = field(repr=False)
    node_ids: Mapping[str, tuple[int | None, str]] = field(repr=False)

    def find(self, filename: str) -> tuple[Owner, str] | None:
        """Return the owner of a file, and the name that it would have had; None for no owner."""
        tag, underscore, rest = filename.partition("_")
        owner = self.owners.get(tag) if underscore else None
        return (owner, rest) if owner else None


def join(items: Sequence[JobGraph], tag: str) -> JoinedGraph:
    """Make one graph of those of several batches.

    Args:
        items: The batches, at least one, made of one template.
        tag: What all prefixes of the job begin with; letters and digits.
    """
    graph: Graph = {}
    owners: dict[str, Owner] = {}
    origins: dict[str, tuple[int | None, str]] = {}
    taken = {node_id for item in items for node_id in item.graph}
    first = items[0].graph
    for item in items:
        repeated = _repeated(item.graph, None if item is items[0] else first)
        names = {node_id: node_id for node_id in item.graph}
        if item is not items[0]:
            names.update((node_id, _new_id(node_id, item.batch, taken)) for node_id in repeated)
        for node_id, node in item.graph.items():
            if item is not items[0] and node_id not in repeated:
                origins[node_id] = None, node_id
                continue
            inputs = {name: _renamed(value, names) for name, value in node["inputs"].items()}
            if _PREFIX_INPUT in inputs:
                prefix = f"{tag}x{item.batch}x{len(owners)}"
                subfolder, name = _split_prefix(inputs[_PREFIX_INPUT])
                owners[prefix] = Owner(item.batch, node_id, subfolder)
                inputs[_PREFIX_INPUT] = f"{prefix}_{name}"
            graph[names[node_id]] = {**node, "inputs": inputs}
            origins[names[node_id]] = item.batch, node_id
    return JoinedGraph(graph, tuple(item.batch for item in items), owners, origins)


def recognise(filenames: Iterable[str], batches: Sequence[int]) -> JoinedGraph:
    """Make what is left of a joined graph when only its files are known, after a restart.

    Args:
        filenames: The names of the files.
        batches: The batches that were in it.
    """
    owners: dict[str, Owner] = {}
    for filename in filenames:
        match = _TAGGED.match(filename)
        if match and int(match[2]) in batches:
            owners[match[1]] = Owner(int(match[2]), "", "")
    return JoinedGraph({}, tuple(batches), owners, {})


def can_be_joined(graph: Graph) -> bool:
    """Tell whether all files that a graph makes can be told apart by their names.

    Which nodes save files only the server knows: here it is guessed by their class's name, so that
    a node whose output nobody uses does not count.
    """
    return all(
        _PREFIX_INPUT in graph[node_id]["inputs"] or not _SAVES.search(graph[node_id]["class_type"])
        for node_id in output_nodes(graph)
    )


def estimate_bytes(graph: Graph, size: int, inputs: Collection[bytes] = ()) -> int:
    """Guess the bytes of a batch's images in base64, from the largest size that a graph names.

    Args:
        graph: The graph.
        size: How many images the batch makes at once.
        inputs: The input images, whose size counts where the graph names none.
    """
    largest = max((_pixels(node["inputs"]) for node in graph.values()), default=0)
    if not largest:
        largest = max(map(_image_pixels, inputs), default=0) or _DEFAULT_PIXELS
    sizes = [node["inputs"].get("batch_size") for node in graph.values()]
    count = max([size, *(number for number in sizes if isinstance(number, int))])
    savers = sum(_PREFIX_INPUT in node["inputs"] for node in graph.values())
    return int(largest * _scale(graph) * _BYTES_PER_PIXEL * count * max(1, savers))


def _pixels(inputs: Mapping[str, object]) -> int:
    width, height = inputs.get("width"), inputs.get("height")
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def _image_pixels(data: bytes) -> int:
    """Return width times height of a PNG, and a guess for anything else."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 24:
        return len(data) * _PIXELS_PER_BYTE
    return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")


def _scale(graph: Graph) -> float:
    scale = 1.0
    for node in graph.values():
        for name in ("scale_by", "upscale_by"):
            factor = node["inputs"].get(name)
            if isinstance(factor, (int, float)) and factor > 0:
                scale *= factor * factor
        if node["class_type"] == "ImageUpscaleWithModel":
            scale *= _model_factor(graph, node["inputs"].get("upscale_model")) ** 2
    return max(scale, 1.0)  # what is made small may not be what is saved


def _model_factor(graph: Graph, link: object) -> int:
    """Guess by how much an upscale model enlarges, from its name, such as `4x-UltraSharp.pth`."""
    loader = graph.get(link[0]) if is_link(link) else None  # type: ignore[index]
    match = _MODEL_FACTOR.search(str(loader["inputs"].get("model_name"))) if loader else None
    return int(match[1] or match[2]) if match else _USUAL_FACTOR


def _repeated(graph: Graph, reference: Graph | None) -> set[str]:
    """Find the nodes that differ from the reference, or save files, and all that need them."""
    users = defaultdict(list)
    for node_id, node in graph.items():
        for value in node["inputs"].values():
            if is_link(value):
                users[value[0]].append(node_id)
    waiting = [
        node_id
        for node_id, node in graph.items()
        if _PREFIX_INPUT in node["inputs"]
        or reference is None
        or node_id not in reference
        or _content(node) != _content(reference[node_id])
    ]
    found = set(waiting)
    while waiting:
        for user in users[waiting.pop()]:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _content(node: Mapping[str, object]) -> tuple[object, object]:
    return node["class_type"], node["inputs"]


def _new_id(node_id: str, batch: int, taken: set[str]) -> str:
    new = f"{node_id}b{batch}"
    while new in taken:
        new += "b"
    taken.add(new)
    return new


def _renamed(value: object, names: Mapping[str, str]) -> object:
    return [names[value[0]], value[1]] if is_link(value) else value  # type: ignore[index]


def _split_prefix(prefix: object) -> tuple[str, str]:
    """Return the folder and the name of a prefix; a link, or what a server would fill in, is
    nothing that can be known here.
    """
    if not isinstance(prefix, str):
        return "", _DEFAULT_NAME
    folder, _, name = prefix.replace("\\", "/").rpartition("/")
    folder = "" if "%" in folder else folder
    return folder, re.sub(r"%.*%", "", name) or _DEFAULT_NAME
