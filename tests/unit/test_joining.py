"""Several batches in one graph: what is shared, what is repeated, whose files are whose."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from comfy_executors.executors.joining import can_be_joined, estimate_bytes, join
from comfy_executors.wire import JobGraph


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


GRAPH = {
    "load": node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
    "text": node("CLIPTextEncode", clip=["load", 1], text="a fox"),
    "latent": node("EmptyLatentImage", width=512, height=256, batch_size=2),
    "sample": node(
        "KSampler", seed=0, model=["load", 0], latent_image=["latent", 0], p=["text", 0]
    ),
    "save": node("SaveImage", images=["sample", 0], filename_prefix="sub/fox"),
}


def batch(index: int, **changes: Any) -> JobGraph:
    graph = copy.deepcopy(GRAPH)
    graph["sample"]["inputs"]["seed"] = 100 + index
    for name, value in changes.items():
        node_id, _, key = name.partition("__")
        graph[node_id]["inputs"][key] = value
    return JobGraph(index, 2, 100 + index, graph)


def kinds(graph: dict[str, Any]) -> list[str]:
    return sorted(entry["class_type"] for entry in graph.values())


def test_what_the_seed_does_not_reach_is_shared() -> None:
    joined = join([batch(3), batch(4), batch(5)], "t")
    assert kinds(joined.graph) == sorted(
        ["CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage"]
        + 3 * ["KSampler", "SaveImage"]
    )
    assert joined.batches == (3, 4, 5)
    seeds = [n["inputs"]["seed"] for n in joined.graph.values() if n["class_type"] == "KSampler"]
    assert seeds == [103, 104, 105]


def test_a_seed_in_a_node_of_its_own_is_repeated() -> None:
    items = [batch(0, sample__seed=["seed", 0]), batch(1, sample__seed=["seed", 0])]
    for item in items:
        item.graph["seed"] = node("PrimitiveInt", value=item.seed)
    joined = join(items, "t")
    samplers = [entry for entry in joined.graph.values() if entry["class_type"] == "KSampler"]
    taken = [joined.graph[entry["inputs"]["seed"][0]]["inputs"] for entry in samplers]
    assert taken == [{"value": 100}, {"value": 101}]


def test_links_lead_to_the_batchs_own_nodes() -> None:
    joined = join([batch(0), batch(1)], "t")
    for node_id, entry in joined.graph.items():
        owner = joined.node_ids[node_id][0]
        for value in entry["inputs"].values():
            if isinstance(value, list):
                assert joined.node_ids[value[0]][0] in (owner, None)
    assert joined.graph["saveb1"]["inputs"]["images"] == ["sampleb1", 0]
    assert joined.graph["sampleb1"]["inputs"]["model"] == ["load", 0]


def test_whatever_differs_is_repeated_with_all_that_needs_it() -> None:
    joined = join([batch(0), batch(1, latent__batch_size=1), batch(2, text__text="a cat")], "t")
    assert joined.graph["latentb1"]["inputs"]["batch_size"] == 1
    assert joined.graph["sampleb1"]["inputs"]["latent_image"] == ["latentb1", 0]
    assert joined.graph["sampleb2"]["inputs"]["p"] == ["textb2", 0]
    assert kinds(joined.graph).count("CheckpointLoaderSimple") == 1


def test_equal_nodes_of_one_graph_stay_two() -> None:
    item = batch(0)
    item.graph["text2"] = copy.deepcopy(item.graph["text"])
    assert kinds(join([item], "t").graph).count("CLIPTextEncode") == 2


def test_files_are_found_by_their_names() -> None:
    joined = join([batch(0), batch(7)], "t")
    for index in (0, 7):
        save = joined.graph["save" if index == 0 else "saveb7"]
        owner, name = joined.find(save["inputs"]["filename_prefix"] + "_00001_.png") or (None, "")
        assert owner is not None
        assert (owner.batch, owner.node_id, owner.subfolder) == (index, "save", "sub")
        assert name == "fox_00001_.png"
    assert joined.find("fox_00001_.png") is None
    assert joined.find("fox.png") is None


@pytest.mark.parametrize(
    ("prefix", "subfolder", "name"),
    [
        ("%date:yyyy%/a", "", "a"),
        ("a/b/%width%x", "a/b", "x"),
        ("%seed%", "", "ComfyUI"),
        ("a\\b", "a", "b"),
        (["text", 0], "", "ComfyUI"),
    ],
)
def test_prefixes_of_all_kinds(prefix: Any, subfolder: str, name: str) -> None:
    joined = join([batch(0, save__filename_prefix=prefix), batch(1)], "t")
    owner, rest = joined.find(joined.graph["save"]["inputs"]["filename_prefix"]) or (None, "")
    assert owner is not None
    assert (owner.subfolder, rest) == (subfolder, name)


def test_new_ids_do_not_take_the_place_of_others() -> None:
    item = batch(1)
    item.graph["saveb1"] = node("PreviewImage", images=["sample", 0])
    joined = join([batch(0), item], "t")
    assert len(joined.graph) == 3 + 2 + 3
    assert len(joined.node_ids) == len(joined.graph)


def test_the_given_graphs_stay_as_they_are() -> None:
    items = [batch(0), batch(1)]
    before = copy.deepcopy(items)
    join(items, "t")
    assert items == before


def test_which_graphs_can_be_joined() -> None:
    graph = copy.deepcopy(GRAPH)
    assert can_be_joined(graph)
    assert can_be_joined({**graph, "p": node("PreviewImage", images=["sample", 0])})
    assert can_be_joined({**graph, "unused": node("EmptyLatentImage", width=8, height=8)})
    assert not can_be_joined({**graph, "w": node("SaveImageWebsocket", images=["sample", 0])})


def test_estimates() -> None:
    two = estimate_bytes(GRAPH, 1)
    assert two == int(512 * 256 * 2.8 * 2)  # its latent says so
    one = two / 2
    assert estimate_bytes(GRAPH, 4) == pytest.approx(4 * one, abs=4)
    upscaled = {**GRAPH, "up": node("ImageScaleBy", image=["sample", 0], scale_by=2.0)}
    assert estimate_bytes(upscaled, 4) == pytest.approx(16 * one, abs=16)
    unsized = {"s": GRAPH["save"]}
    assert estimate_bytes(unsized, 1) == int(1024 * 1024 * 2.8)
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + bytes([0, 0, 0, 100, 0, 0, 1, 0])
    assert estimate_bytes(unsized, 1, [png]) == pytest.approx(100 * 256 * 2.8, abs=2)
    assert estimate_bytes(unsized, 1, [png, bytes(3_000_000)]) == pytest.approx(9e6 * 2.8, abs=2)
    assert estimate_bytes(unsized, 1, [b""]) == int(1024 * 1024 * 2.8)


@pytest.mark.parametrize(
    ("model", "factor"),
    [
        ("4x-UltraSharp.pth", 4),
        ("RealESRGAN_x2plus.pth", 2),
        ("folder/8x_NMKD.pth", 8),
        ("BSRGAN.pth", 4),
        (["9", 0], 4),
    ],
)
def test_an_upscale_model_enlarges_the_estimate(model: Any, factor: int) -> None:
    graph = {
        "load": node("UpscaleModelLoader", model_name=model),
        "up": node("ImageUpscaleWithModel", upscale_model=["load", 0], image=["2", 0]),
        "save": GRAPH["save"],
    }
    assert estimate_bytes(graph, 1) == int(1024 * 1024 * factor**2 * 2.8)
    halved = {**graph, "half": node("ImageScaleBy", image=["up", 0], scale_by=0.5)}
    assert estimate_bytes(halved, 1) == int(1024 * 1024 * factor**2 * 2.8 / 4)
