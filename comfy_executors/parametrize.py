"""What a person would turn into variables in an exported workflow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from comfy_executors.graphs import Graph, class_type, find_takers, is_link, node_title
from comfy_executors.prompts import find_prompts

# Inputs of any node, and the variables that they become.
_STRENGTHS = ("cfg", "guidance")
_MODELS = {"ckpt_name": "checkpoint", "unet_name": "diffusion_model"}
_SIZES = ("width", "height")
# Nodes that are told the size of the canvas though they do not make it.
_TOLD_THE_SIZE = ("ModelSampling", "CLIPTextEncode", "TextEncode", "Flux2Scheduler")
# How what a sampler works with comes to it, in inputs of its own.
_WAYS_TO_SAMPLERS = ("model", "sigmas", "guider", "latent_image", "latent", "samples")
_FOLDER_INPUTS = ("directory", "folder", "folder_path", "path")
# These take a folder below the server's input folder, not a path.
_BELOW_INPUT = frozenset(
    {"VHS_LoadImages", "LoadImageDataSetFromFolder", "LoadImageTextDataSetFromFolder"}
)


class Place(NamedTuple):
    """An input of a node."""

    node_id: str
    input_name: str


@dataclass(frozen=True)
class Parameter:
    """Places of a workflow that become one variable.

    Args:
        name: The variable.
        places: Where its value goes; in the export all of them hold the same.
        value: What the export has there.
        required: Whether it must be given; otherwise the export's value is its default.
        expression: How the template writes it, when that is not the name alone.
        default: How the template writes its default, when that is not the value alone.
    """

    name: str
    places: tuple[Place, ...]
    value: Any
    required: bool = False
    expression: str = ""
    default: str = ""


def find_parameters(graph: Graph) -> list[Parameter]:
    """Find what a person would change from call to call.

    The prompts, the size, steps, cfg and guidance, and the models keep their values as defaults; a
    step at which one model leaves the rest to another keeps its share of the steps. The batch size
    and the input images, which the executor fills in, become required. Seeds stay as they are: the
    executor replaces them by themselves.

    Args:
        graph: A workflow in ComfyUI's API format.
    """
    prompts, negatives = find_prompts(graph)
    # What serves the prompts gets the plain names, not what prepares a control image.
    whole = graph
    graph = _with_first(graph, _serving(graph, [node_id for node_id, _ in prompts]))
    found = [
        *_named(graph, "prompt", (Place(*place) for place in prompts)),
        *_named(graph, "negative_prompt", (Place(*place) for place in negatives)),
    ]
    for name in _SIZES:
        found += _named(graph, name, _size_places(graph, name))
    # The executor has one batch size for all.
    found += [_required(parameter) for parameter in _batch_sizes(graph)[:1]]
    steps = _named(graph, "steps", _step_counts(graph))
    found += [*steps, *_switch_steps(graph, steps)]
    for name in _STRENGTHS:
        found += _named(graph, name, _number_places(graph, name))
    for name, variable in _MODELS.items():
        places = (Place(node, name) for node in graph if _text(graph, node, name))
        found += _named(graph, variable, places)
    return [*found, *_input_images(whole), *_input_folders(whole)]


def _with_first(graph: Graph, first: set[str]) -> Graph:
    return {
        node_id: graph[node_id] for node_id in sorted(graph, key=lambda node: node not in first)
    }


def _serving(graph: Graph, prompts: list[str]) -> set[str]:
    """Return the nodes that prompts lead to, and those that give these their models and sizes."""
    users: dict[str, list[str]] = {}
    for node_id, node in graph.items():
        for value in filter(is_link, node["inputs"].values()):
            users.setdefault(value[0], []).append(node_id)
    led_to = _closure(prompts, lambda node_id: users.get(node_id, []))
    return _closure(led_to, lambda node_id: _work_of(graph, node_id))


def _work_of(graph: Graph, node_id: str) -> list[str]:
    inputs = graph[node_id]["inputs"]
    return [inputs[name][0] for name in _WAYS_TO_SAMPLERS if is_link(inputs.get(name))]


def _closure(start: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(start)
    while todo:
        node_id = todo.pop()
        if node_id not in seen:
            seen.add(node_id)
            todo += following(node_id)
    return seen


def _required(parameter: Parameter) -> Parameter:
    return Parameter(parameter.name, parameter.places, parameter.value, required=True)


# Names for values.


def _named(graph: Graph, base: str, places: Iterable[Place]) -> list[Parameter]:
    """Give one name to equal values: the plain one to the first, clear ones to the others."""
    groups: list[list[Place]] = []
    for place in dict.fromkeys(places):
        value = _value(graph, place)
        for group in groups:
            other = _value(graph, group[0])
            if type(other) is type(value) and other == value:
                group.append(place)
                break
        else:
            groups.append([place])
    names: list[str] = []
    for group in groups:
        names.append(_clear_name(graph, base, group[0], names, [other[0] for other in groups]))
    return [
        Parameter(name, tuple(group), _value(graph, group[0])) for name, group in zip(names, groups)
    ]


def _clear_name(
    graph: Graph, base: str, place: Place, taken: list[str], all_places: list[Place]
) -> str:
    if not taken:
        return base
    titles = [node_title(graph, other.node_id) for other in all_places]
    title = node_title(graph, place.node_id)
    if sum(other.node_id == place.node_id for other in all_places) > 1:
        word = _word(place.input_name, "")
    elif title is not None and titles.count(title) == 1:
        word = _word(title, base) or _word(place.node_id, "")
    else:
        word = _word(place.node_id, "")
    name = f"{base}_{word or len(taken) + 1}"
    return name if name not in taken else f"{name}_{len(taken) + 1}"


def _word(text: str, base: str) -> str:
    """Return a text as part of a variable's name, without the words of the name it follows."""
    dull = {*base.split("_"), "positive"}
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    words = re.findall(r"[a-z0-9]+", spaced.lower())
    return "_".join(word for word in words if word not in dull)


def _value(graph: Graph, place: Place) -> Any:
    return graph[place.node_id]["inputs"][place.input_name]


# Numbers.


def _number_places(graph: Graph, name: str) -> Iterator[Place]:
    return (place for node_id in graph for place in _places_of(graph, node_id, name))


def _number_place(graph: Graph, node_id: str, name: str) -> Place | None:
    """Return where an input's number stands: there, or in a node that holds only a number."""
    value = graph[node_id]["inputs"].get(name)
    if _is_number(value):
        return Place(node_id, name)
    if is_link(value):
        inputs = graph[value[0]]["inputs"]
        if list(inputs) == ["value"] and _is_number(inputs["value"]):
            return Place(value[0], "value")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _step_counts(graph: Graph) -> Iterator[Place]:
    """Find numbers of steps, and the ends of samplers that go on to their last step."""
    for node_id in graph:
        steps, end = _steps_and_end(graph, node_id)
        if steps is not None:
            yield steps
            if end is not None and _value(graph, end) == _value(graph, steps):
                yield end


def _switch_steps(graph: Graph, steps: list[Parameter]) -> list[Parameter]:
    """Find the steps at which a sampler leaves the rest to another one, with another model."""
    counts = {place: parameter for parameter in steps for place in parameter.places}
    switches: dict[Place, Parameter] = {}
    for node_id in graph:
        count, end = _steps_and_end(graph, node_id)
        if count is None or end is None or not 0 < _value(graph, end) < _value(graph, count):
            continue
        starts = [
            place
            for place in _number_places(graph, "start_at_step")
            if _value(graph, place) == _value(graph, end)
        ]
        if starts:
            switches.update(dict.fromkeys([end, *starts], counts[count]))
    return [
        replace(switch, default=_share(switch, switches[switch.places[0]]))
        for switch in _named(graph, "switch_step", switches)
    ]


def _steps_and_end(graph: Graph, node_id: str) -> tuple[Place | None, Place | None]:
    return _number_place(graph, node_id, "steps"), _number_place(graph, node_id, "end_at_step")


def _share(switch: Parameter, steps: Parameter) -> str:
    """Write the default that keeps its share of the steps, so that no model is left without any."""
    if type(switch.value) is not int or type(steps.value) is not int:
        return ""  # what a division makes of it would not be the number of the export
    count = f"({steps.name} | default({steps.value}) | int)"
    return f"[1, {count} * {switch.value} // {steps.value}] | max"


def _size_places(graph: Graph, name: str) -> list[Place]:
    found = [
        place
        for node_id in graph
        if _is_canvas(graph, node_id)
        for place in _places_of(graph, node_id, name, f"empty_latent_{name}")
    ]
    sizes = [_value(graph, place) for place in found]
    told = [
        place
        for node_id in graph
        if (class_type(graph, node_id) or "").startswith(_TOLD_THE_SIZE)
        for place in _places_of(graph, node_id, name, f"target_{name}")
    ]
    return found + [place for place in told if _value(graph, place) in sizes]


def _places_of(graph: Graph, node_id: str, *names: str) -> Iterator[Place]:
    places = (_number_place(graph, node_id, name) for name in names)
    return (place for place in places if place is not None)


def _is_canvas(graph: Graph, node_id: str) -> bool:
    """Tell whether a node makes an empty latent or image of a given size."""
    inputs = graph[node_id]["inputs"]
    if "empty_latent_width" in inputs:
        return True
    empty = "batch_size" in inputs or "Empty" in (class_type(graph, node_id) or "")
    return empty and "width" in inputs and "height" in inputs


def _batch_sizes(graph: Graph) -> list[Parameter]:
    takers = find_takers(graph)
    places = [
        place
        for node_id in graph
        if _makes_a_batch(graph, node_id)
        for place in _places_of(graph, node_id, "batch_size")
        if type(_value(graph, place)) is int
        and (place.node_id == node_id or takers[place.node_id] == {"batch_size"})
    ]
    return _named(graph, "batch_size", places)


def _makes_a_batch(graph: Graph, node_id: str) -> bool:
    name = class_type(graph, node_id) or ""
    return _is_canvas(graph, node_id) or ("Empty" in name and "Latent" in name)


# Images.


def _text(graph: Graph, node_id: str, name: str) -> str | None:
    value = graph[node_id]["inputs"].get(name)
    return value if isinstance(value, str) and value else None


def _loader(graph: Graph, node_id: str) -> bool:
    name = (class_type(graph, node_id) or "").replace(" ", "").lower()
    return "loadimage" in name and "output" not in name


def _input_images(graph: Graph) -> list[Parameter]:
    places: dict[str, list[Place]] = {}
    for node_id in graph:
        image = _text(graph, node_id, "image")
        # A name with a folder in brackets is a file that the server made itself.
        if _loader(graph, node_id) and image and not image.endswith("]"):
            places.setdefault(image, []).append(Place(node_id, "image"))
    return [
        Parameter("input_images", tuple(where), image, True, f"input_images[{index}]")
        for index, (image, where) in enumerate(places.items())
    ]


def _input_folders(graph: Graph) -> list[Parameter]:
    places = [
        Place(node_id, name)
        for node_id in graph
        if _loader(graph, node_id) and not _text(graph, node_id, "image")
        for name in _FOLDER_INPUTS
        if _text(graph, node_id, name)
    ]
    # The executor has one folder for all.
    for parameter in _named(graph, "input_images_dir", places)[:1]:
        name = class_type(graph, parameter.places[0].node_id)
        below = name in _BELOW_INPUT
        expression = 'input_images_dir | replace("input/", "")' if below else ""
        return [Parameter(parameter.name, parameter.places, parameter.value, True, expression)]
    return []


def required_variables(parameters: Iterable[Parameter]) -> dict[str, Any]:
    """Return the required variables with the values that render the export as it was."""
    given: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.expression.startswith("input_images["):
            given.setdefault("input_images", []).append(parameter.value)
        elif parameter.required:
            given[parameter.name] = parameter.value
    return given
