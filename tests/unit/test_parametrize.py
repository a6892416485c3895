"""From an export to a template that renders to the export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template_properties import TEXTS, VALUES

from comfy_executors import ComfyExecutorsError, GraphError, WorkflowTemplate
from comfy_executors.parametrize import find_parameters, required_variables
from comfy_executors.template_text import write_template

TESTS = Path(__file__).parents[1]
EXPORTS = sorted((TESTS / "exports").glob("*/*.json"))


def recorded_graphs() -> list[Any]:
    """Every whole graph that was posted in the recordings of real servers."""
    graphs = []
    for path in sorted((TESTS / "recordings").glob("*/[0-9]*.json")):
        for event in json.loads(path.read_text("utf-8")):
            sent = event.get("sent")
            if event.get("http") == "POST /prompt" and isinstance(sent, dict):
                graphs.append(sent.get("prompt"))
    return [graph for graph in graphs if is_whole(graph)]


def is_whole(graph: Any) -> bool:
    try:
        WorkflowTemplate.from_graph(graph)
    except ComfyExecutorsError:
        return False
    return True


def assert_survives(graph: Any) -> WorkflowTemplate:
    template = WorkflowTemplate.from_graph(graph, auto=True)
    required = required_variables(find_parameters(graph))
    assert template.required_variables == required.keys()
    # As a file, as the command writes it.
    again = WorkflowTemplate(template.text.encode("utf-8").decode("utf-8"))
    assert json.dumps(again.render(**required)) == json.dumps(graph)
    return template


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_an_export_survives_as_a_template(path: Path) -> None:
    assert_survives(json.loads(path.read_text("utf-8")))


def test_every_recorded_graph_survives_as_a_template() -> None:
    graphs = recorded_graphs()
    assert len(graphs) > 40
    for graph in graphs:
        assert_survives(graph)


FOUND = {
    "sd15": "prompt 6.text; negative_prompt 7.text; width 5.width; height 5.height;"
    " batch_size! 5.batch_size; steps 3.steps; cfg 3.cfg; checkpoint 4.ckpt_name",
    "sdxl_refiner": "prompt 6.text_g 6.text_l; prompt_refiner 15.text;"
    " negative_prompt 7.text_g 16.text; negative_prompt_text_l 7.text_l;"
    " width 5.width 6.width 6.target_width 15.width 16.width;"
    " height 5.height 6.height 6.target_height 15.height 16.height; batch_size! 5.batch_size;"
    " steps 10.steps 11.steps; switch_step 10.end_at_step 11.start_at_step;"
    " cfg 10.cfg 11.cfg; checkpoint 4.ckpt_name; checkpoint_load_refiner 12.ckpt_name",
    "flux_guider": "prompt 6.clip_l; prompt_t5xxl 6.t5xxl; width 27.width 30.width;"
    " height 27.height 30.height; batch_size! 27.batch_size; steps 17.steps;"
    " guidance 6.guidance; guidance_flux 26.guidance; diffusion_model 12.unet_name",
    "cfg_guider_subgraph": "prompt 57:27.text; negative_prompt 57:33.text; width 57:50.value;"
    " height 57:51.value; batch_size! 57:13.batch_size; steps 57:42.steps; cfg 57:41.cfg;"
    " diffusion_model 57:28.unet_name",
    "controlnet_combine": "prompt 2.text; prompt_person 3.text; negative_prompt 6.text;"
    " width 12.width; height 12.height; batch_size! 12.batch_size; steps 13.steps; cfg 13.cfg;"
    " checkpoint 1.ckpt_name; input_images[0]! 8.image; input_images[1]! 9.image",
    "inpaint": "prompt 4.text; negative_prompt 5.text; steps 7.steps; cfg 7.cfg;"
    " checkpoint 1.ckpt_name; input_images[0]! 2.image 3.image",
    "strings": "prompt 2.value; prompt_style 3.value; width 9.width; height 9.height;"
    " batch_size! 9.batch_size; steps 7.value; cfg 8.value; checkpoint 1.ckpt_name",
    "folder": "input_images_dir! 1.directory",
    "folder_below_input": 'input_images_dir | replace("input/", "")! 1.directory',
    "wan_video": "prompt 6.text; negative_prompt 7.text; width 63.width; height 63.height;"
    " batch_size! 63.batch_size; steps 57.steps 58.steps;"
    " switch_step 57.end_at_step 58.start_at_step; cfg 57.cfg; cfg_second 58.cfg;"
    " diffusion_model 37.unet_name; diffusion_model_low_noise 56.unet_name;"
    " input_images[0]! 62.image",
    "remote_node": "prompt 2.prompt; input_images[0]! 1.image",
    "hires": "prompt 4.text; negative_prompt 5.text; width 6.width; height 6.height;"
    " batch_size! 6.batch_size; steps 7.steps; steps_second_pass 9.steps; cfg 7.cfg;"
    " cfg_second_pass 9.cfg; checkpoint 1.ckpt_name",
    "custom_loader": "prompt 1.positive; negative_prompt 1.negative; width 1.empty_latent_width;"
    " height 1.empty_latent_height; batch_size! 1.batch_size; steps 2.steps; cfg 2.cfg;"
    " checkpoint 1.ckpt_name",
    "nothing_to_change": "",
    "hostile": "prompt 6.text; negative_prompt 7.text; width 5.width; height 5.height;"
    " batch_size! 5.batch_size; steps 57:3.steps; cfg 57:3.cfg; checkpoint {{ 4 }}.ckpt_name",
    # Of the editor's own workflows those that take a turn of their own.
    "image_omnigen2_image_edit": "prompt 6.text; negative_prompt 7.text; batch_size! 11.batch_size;"
    " steps 23.steps; diffusion_model 12.unet_name; input_images[0]! 16.image",
    "flux_redux_model_example": "prompt 6.text; width 27.width 30.width; height 27.height"
    " 30.height; batch_size! 27.batch_size; steps 17.steps; guidance 26.guidance;"
    " diffusion_model 12.unet_name; input_images[0]! 40.image; input_images[1]! 47.image",
    "audio_ace_step_1_t2a_instrumentals": "prompt 14.tags; prompt_lyrics 14.lyrics;"
    " batch_size! 17.batch_size; steps 52.steps; cfg 52.cfg; checkpoint 40.ckpt_name",
    "utility-gan_upscaler": "",
    # The nodes 112:… make the control image, and come first in the file.
    "image_qwen_image_instantx_controlnet": "prompt 111:6.text; negative_prompt 111:7.text;"
    " steps 111:3.steps; steps_112_20 112:20.steps; cfg 111:3.cfg;"
    " diffusion_model 111:37.unet_name; diffusion_model_112_10 112:10.unet_name;"
    " input_images[0]! 71.image",
}


def test_every_hand_written_export_is_looked_at() -> None:
    assert {path.stem for path in EXPORTS if path.parent.name == "api"} <= FOUND.keys()


@pytest.mark.parametrize("name", FOUND)
def test_what_becomes_a_variable(name: str) -> None:
    (path,) = (path for path in EXPORTS if path.stem == name)
    parameters = find_parameters(json.loads(path.read_text("utf-8")))
    told = [
        f"{item.expression or item.name}{'!' if item.required else ''} "
        + " ".join(f"{place.node_id}.{place.input_name}" for place in item.places)
        for item in parameters
    ]
    assert "; ".join(told) == FOUND[name]


def test_a_text_that_is_zeroed_out_is_no_negative_prompt() -> None:
    graph = json.loads((TESTS / "exports/api/controlnet_combine.json").read_text("utf-8"))
    graph["6"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}}
    found = {item.name: item.places[0].node_id for item in find_parameters(graph)}
    assert found["prompt"] == "2"
    assert found["prompt_person"] == "3"
    assert "negative_prompt" not in found


def test_defaults_and_variables_go_where_they_belong() -> None:
    graph = json.loads((TESTS / "exports/api/sd15.json").read_text("utf-8"))
    template = WorkflowTemplate.from_graph(graph, auto=True)
    assert template.defaults["negative_prompt"] == "text, watermark"
    assert template.defaults["steps"] == 20
    changed = template.render(batch_size=4, prompt='a "fox"\n{{ x }}', width=640)
    assert changed["6"]["inputs"]["text"] == 'a "fox"\n{{ x }}'
    assert changed["5"]["inputs"] == {"width": 640, "height": 768, "batch_size": 4}
    assert changed["3"] == graph["3"]


def wan_graph() -> Any:
    return json.loads((TESTS / "exports/api/wan_video.json").read_text("utf-8"))


def steps_of(rendered: Any) -> list[list[Any]]:
    names = ("steps", "start_at_step", "end_at_step")
    return [[rendered[node]["inputs"][name] for name in names] for node in ("57", "58")]


@pytest.mark.parametrize(
    ("given", "steps", "switch"),
    [
        ({}, 20, 10),
        ({"steps": 8}, 8, 4),
        ({"steps": 41}, 41, 20),
        ({"steps": "8"}, "8", 4),  # as `--var steps=8` gives it
        ({"steps": 1}, 1, 1),  # a model without any step would only pass noise on
        ({"switch_step": 3}, 20, 3),
        ({"steps": 8, "switch_step": 6}, 8, 6),
    ],
)
def test_the_second_model_keeps_its_share_of_the_steps(
    given: dict[str, Any], steps: Any, switch: int
) -> None:
    template = WorkflowTemplate.from_graph(wan_graph(), auto=True)
    rendered = template.render(batch_size=1, input_images=["start.png"], **given)
    assert steps_of(rendered) == [[steps, 0, switch], [steps, switch, 10000]]


def test_a_sampler_that_goes_on_to_the_last_step_still_does_with_more_steps() -> None:
    graph = wan_graph()
    graph["58"]["inputs"]["end_at_step"] = 20
    template = assert_survives(graph)
    rendered = template.render(batch_size=1, input_images=["start.png"], steps=30)
    assert steps_of(rendered) == [[30, 0, 15], [30, 15, 30]]


def test_several_switches_and_one_in_a_node_of_its_own() -> None:
    graph = wan_graph()
    graph["90"] = {"class_type": "PrimitiveInt", "inputs": {"value": 10}}
    graph["57"]["inputs"]["end_at_step"] = graph["58"]["inputs"]["start_at_step"] = ["90", 0]
    graph["58"]["inputs"]["end_at_step"] = 15
    graph["59"] = {"class_type": "KSamplerAdvanced", "inputs": {**graph["58"]["inputs"]}}
    graph["59"]["inputs"].update(start_at_step=15, end_at_step=20)
    template = assert_survives(graph)
    names = {item.name: item.places for item in find_parameters(graph)}
    assert names["switch_step"] == (("90", "value"),)
    assert names["switch_step_second"] == (("58", "end_at_step"), ("59", "start_at_step"))
    rendered = template.render(batch_size=1, input_images=["start.png"], steps=8)
    assert rendered["90"]["inputs"]["value"] == 4
    assert rendered["59"]["inputs"]["start_at_step"] == 6


@pytest.mark.parametrize(("end", "start"), [(0, 0), (20, 20), (10000, 10000), (10, 11)])
def test_steps_that_are_no_switch_stay(end: int, start: int) -> None:
    graph = wan_graph()
    graph["57"]["inputs"]["end_at_step"] = end
    graph["58"]["inputs"]["start_at_step"] = start
    assert "switch_step" not in assert_survives(graph).variables


def test_a_switch_that_division_would_change_has_its_own_default() -> None:
    graph = wan_graph()
    for node in ("57", "58"):
        graph[node]["inputs"]["steps"] = 20.0
    assert assert_survives(graph).defaults["switch_step"] == 10


def test_a_batch_size_in_a_node_of_its_own_is_replaced_there() -> None:
    graph = json.loads((TESTS / "exports/api/sd15.json").read_text("utf-8"))
    graph["90"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    graph["5"]["inputs"]["batch_size"] = ["90", 0]
    rendered = assert_survives(graph).render(batch_size=8)
    assert rendered["90"]["inputs"]["value"] == 8
    assert rendered["5"] == graph["5"]


def test_a_number_that_is_not_for_the_batch_size_alone_stays() -> None:
    graph = json.loads((TESTS / "exports/api/sd15.json").read_text("utf-8"))
    graph["90"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    graph["5"]["inputs"]["batch_size"] = ["90", 0]
    graph["3"]["inputs"]["steps"] = ["90", 0]
    template = assert_survives(graph)
    assert "batch_size" not in template.variables
    assert template.defaults["steps"] == 3


@pytest.mark.parametrize("value", [["91", 0], 2.0, "3"])
def test_a_batch_size_that_another_node_works_out_stays(value: Any) -> None:
    graph = json.loads((TESTS / "exports/api/sd15.json").read_text("utf-8"))
    graph["90"] = {"class_type": "MathExpression", "inputs": {"value": value}}
    graph["91"] = {"class_type": "CountImages", "inputs": {}}
    graph["5"]["inputs"]["batch_size"] = ["90", 0]
    assert "batch_size" not in assert_survives(graph).variables


def test_input_images_go_in_by_their_order() -> None:
    graph = json.loads((TESTS / "exports/api/controlnet_combine.json").read_text("utf-8"))
    template = WorkflowTemplate.from_graph(graph, auto=True)
    rendered = template.render(batch_size=1, input_images=["a.png", "b.png"])
    assert [rendered[node]["inputs"]["image"] for node in ("8", "9")] == ["a.png", "b.png"]


def test_an_input_folder_is_given_as_its_node_takes_it() -> None:
    for name, wanted in (("folder", "input/0123"), ("folder_below_input", "0123")):
        graph = json.loads((TESTS / f"exports/api/{name}.json").read_text("utf-8"))
        template = WorkflowTemplate.from_graph(graph, auto=True)
        rendered = template.render(input_images_dir="input/0123")
        assert rendered["1"]["inputs"]["directory"] == wanted


def test_the_template_is_readable() -> None:
    graph = json.loads((TESTS / "exports/api/sd15.json").read_text("utf-8"))
    lines = write_template(graph, find_parameters(graph)).splitlines()
    assert lines[:2] == [
        "{# Required: batch_size.",
        "   Optional: prompt, negative_prompt, width, height, steps, cfg, checkpoint. #}",
    ]
    assert '      "model": ["4", 0],' in lines
    assert '      "batch_size": {{ batch_size }}' in lines
    assert '      "text": "{{ negative_prompt | default("text, watermark") }}",' in lines


@pytest.mark.parametrize("value", [math.nan, math.inf, {1}, {1: 2}, b"x"])
def test_what_json_cannot_express_is_refused(value: Any) -> None:
    graph = {"1": {"class_type": "A", "inputs": {"x": value}}}
    with pytest.raises(GraphError, match="cannot be written as JSON"):
        WorkflowTemplate.from_graph(graph, auto=True)


def hostile_graph(texts: list[str], value: Any) -> Any:
    title, positive, negative, model, key = texts
    return {
        f"9{key}": {
            "class_type": f"KSampler{title}",
            "inputs": {
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
                "steps": 3,
                f"x{key}": [value],
            },
            "_meta": {"title": title},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": positive}},
        "7": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": negative},
            "_meta": {"title": key},
        },
        "5": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 8, "height": 8, "batch_size": 1},
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"x{model}"}},
        "8": {
            "class_type": "LoadImage",
            "inputs": {"image": f"y{model}"},
            key: {"{%": value, key: title},
        },
    }


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(TEXTS, min_size=5, max_size=5), VALUES)
def test_any_text_survives_and_can_be_replaced(texts: list[str], value: Any) -> None:
    graph = hostile_graph(texts, value)
    template = assert_survives(graph)
    required = required_variables(find_parameters(graph))
    changed = template.render(**required, prompt=texts[0], checkpoint=texts[4])
    assert changed["6"]["inputs"]["text"] == texts[0]
    assert changed["4"]["inputs"]["ckpt_name"] == texts[4]
    assert list(changed) == list(graph)
