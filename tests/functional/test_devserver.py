"""What the dev server executes, in which order, and what it remembers."""

from __future__ import annotations

import io
import json
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from devserver_client import (
    Client,
    bench,
    call,
    dev_server,
    endless,
    finished,
    get,
    kind_of,
    node,
    output,
    pixels,
    plain,
    post,
    running,
    text_to_image,
)
from PIL import Image

from comfy_executors.devserver import DevServer


@pytest.fixture
def server() -> Iterator[DevServer]:
    with dev_server() as started:
        yield started


def test_text_to_image_paints_the_same_picture_for_the_same_seed(server: DevServer) -> None:
    client = Client(server)
    ids = []
    for seed, text in [(1, "a fox"), (2, "a fox"), (1, "an owl"), (1, "a fox")]:
        ids.append(client.post(text_to_image(seed, text)))
        client.end()
    first, other_seed, other_text, again = (pixels(server, output(server, id_)[0]) for id_ in ids)
    assert first.size == (128, 128)
    assert first.tobytes() == again.tobytes()
    assert len({image.tobytes() for image in (first, other_seed, other_text)}) == 3
    assert json.loads(first.text["prompt"])["6"]["inputs"]["text"] == "a fox"  # type: ignore[attr-defined]


def test_images_of_a_batch_differ(server: DevServer) -> None:
    prompt_id = post(server, text_to_image())
    server.wait_for(finished())
    first, second = output(server, prompt_id)
    assert pixels(server, first).tobytes() != pixels(server, second).tobytes()


def test_nodes_run_in_the_order_of_their_links(server: DevServer) -> None:
    post(server, text_to_image())
    server.wait_for(finished())
    order = server.prompts[0].executed_nodes
    assert sorted(order) == ["3", "4", "5", "6", "7", "8", "9"]
    assert order.index("4") < order.index("6") < order.index("3") < order.index("8")
    assert order[-1] == "9"


def test_another_seed_runs_only_what_depends_on_it(server: DevServer) -> None:
    client = Client(server)
    client.run(text_to_image(1))
    messages = client.run(text_to_image(2))
    assert server.prompts[1].executed_nodes == ["3", "8", "9"]
    assert server.prompts[1].cached_nodes == ["4", "5", "6", "7"]
    cached = next(message for message in messages if kind_of(message) == "execution_cached")
    assert cached["data"]["nodes"] == ["4", "5", "6", "7"]
    assert server.node_runs == Counter(
        KSampler=2, VAEDecode=2, SaveImage=2, CLIPTextEncode=2,
        CheckpointLoaderSimple=1, EmptyLatentImage=1,
    )  # fmt: skip


def test_only_the_prompt_before_is_remembered(server: DevServer) -> None:
    client = Client(server)
    for color in (1, 2, 1):
        client.run(plain(color))
    assert server.node_runs == Counter(EmptyImage=3, SaveImage=3)


def test_an_unknown_input_breaks_the_cache_and_is_ignored(server: DevServer) -> None:
    client = Client(server)
    client.run(plain())
    graph = plain()
    graph["2"]["inputs"]["unheard_of"] = "x"
    client.run(graph)
    assert server.prompts[1].status == "success"
    assert server.prompts[1].executed_nodes == ["2"]


def test_outputs_of_cached_nodes_need_a_client_id(server: DevServer) -> None:
    first = post(server, plain())
    server.wait_for(finished(1))
    second = post(server, plain())
    server.wait_for(finished(2))
    assert len(output(server, first)) == 1
    assert output(server, second) == []


def test_a_changed_input_file_is_loaded_again(server: DevServer) -> None:
    graph = {
        "1": node("LoadImage", image="example.png"),
        "2": node("SaveImage", images=["1", 0], filename_prefix="loaded"),
    }
    client = Client(server)
    client.run(graph)
    client.run(graph)
    assert server.node_runs["LoadImage"] == 1
    Image.new("RGB", (3, 5)).save(server.directory / "input" / "example.png")
    prompt_id = client.post(graph)
    client.end()
    assert pixels(server, output(server, prompt_id)[0]).size == (3, 5)


def test_save_image_websocket_is_never_cached(server: DevServer) -> None:
    graph = {
        "1": node("EmptyImage", width=4, height=4, batch_size=1, color=0),
        "2": node("SaveImageWebsocket", images=["1", 0]),
    }
    client = Client(server)
    for _ in range(2):
        frames = [message for message in client.run(graph) if isinstance(message, bytes)]
        assert len(frames) == 1
    assert server.node_runs == Counter(EmptyImage=1, SaveImageWebsocket=2)


def test_a_frame_of_more_than_a_mebibyte_arrives_whole(server: DevServer) -> None:
    graph = bench(size=800)
    graph["2"] = node("SaveImageWebsocket", images=["1", 0])
    client = Client(server, flags=True)
    (frame,) = [message for message in client.run(graph) if isinstance(message, bytes)]
    kind, length = struct.unpack(">II", frame[:8])
    assert kind == 4
    assert json.loads(frame[8 : 8 + length])["node_id"] == "2"
    assert len(frame) > 1 << 20
    assert Image.open(io.BytesIO(frame[8 + length :])).size == (800, 800)


def test_one_prompt_at_a_time_by_number(server: DevServer) -> None:
    blocker = post(server, endless())
    server.wait_for(running)
    places: list[dict[str, Any]] = [{}, {"number": 9}, {"front": True}, {"number": -5}]
    for color, place in enumerate(places):
        post(server, plain(color), **place)
    assert [entry[0] for entry in get(server, "/queue")["queue_pending"]] == [-5, -3, 1, 9]
    call(server, "POST", "/interrupt", json={"prompt_id": blocker})
    server.wait_for(finished(5))
    ran = sorted(server.prompts, key=lambda record: record.started or 0.0)
    assert [record.number for record in ran] == [0, -5, -3, 1, 9]
    assert all((a.ended or 0) <= (b.started or 0) for a, b in zip(ran, ran[1:]))


def test_partial_execution_targets_limit_the_outputs(server: DevServer) -> None:
    graph = {**plain(), "3": node("PreviewImage", images=["1", 0])}
    prompt_id = post(server, graph, partial_execution_targets=["3"])
    server.wait_for(finished())
    assert list(get(server, f"/history/{prompt_id}")[prompt_id]["outputs"]) == ["3"]


def test_numbers_of_files_go_on_from_what_is_there(server: DevServer) -> None:
    folder = server.directory / "output" / "sub"
    folder.mkdir()
    (folder / "x_00041_.webp").touch()
    (folder / "xy_00099_.png").touch()
    client = Client(server)
    for color in (1, 2):
        client.run(plain(color, prefix="sub/x"))
    assert {path.name for path in folder.glob("x_*.png")} == {"x_00042_.png", "x_00043_.png"}


def test_a_sampler_takes_its_time(server: DevServer) -> None:
    post(server, bench(seconds=0.05))
    server.wait_for(finished())
    (record,) = server.prompts
    assert record.ended is not None
    assert record.started is not None
    assert record.ended - record.started >= 0.05


def test_step_seconds_is_the_time_of_a_step() -> None:
    with dev_server(step_seconds=0.01) as server:
        post(server, text_to_image())
        server.wait_for(finished())
        (record,) = server.prompts
        assert (record.ended or 0) - (record.started or 0) >= 0.04


def test_every_node_class_that_is_described_exists(server: DevServer) -> None:
    from comfy_executors.devserver.nodes import NODES

    assert set(get(server, "/object_info")) == set(NODES)


def image_graph(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {
        "1": node("EmptyImage", width=40, height=20, batch_size=3, color=0x102030),
        "2": node(class_type, **inputs),
        "3": node("SaveImage", images=["2", 0], filename_prefix="out"),
    }


SCALE = {"upscale_method": "lanczos", "width": 10, "height": 0, "crop": "disabled"}
BY_TWO = {"upscale_method": "area", "scale_by": 2.0}
CORNER = {"width": 8, "height": 8, "x": 36, "y": 0}
LINK = ["1", 0]
COLOUR = (16, 32, 48)


@pytest.mark.parametrize(
    ("class_type", "inputs", "count", "size", "colour"),
    [
        ("ImageScale", {"image": LINK, **SCALE}, 3, (10, 5), COLOUR),
        ("ImageScaleBy", {"image": LINK, **BY_TWO}, 3, (80, 40), COLOUR),
        ("ImageInvert", {"image": LINK}, 3, (40, 20), (239, 223, 207)),
        ("ImageBatch", {"image1": LINK, "image2": LINK}, 6, (40, 20), COLOUR),
        ("ImageCrop", {"image": LINK, **CORNER}, 3, (4, 8), COLOUR),
        ("ImageBlur", {"image": LINK, "blur_radius": 2, "sigma": 1.0}, 3, (40, 20), COLOUR),
        ("RepeatImageBatch", {"image": LINK, "amount": 2}, 6, (40, 20), COLOUR),
        ("ImageFromBatch", {"image": LINK, "batch_index": -1, "length": 2}, 1, (40, 20), COLOUR),
        (
            "ImageBlend",
            {"image1": LINK, "image2": LINK, "blend_factor": 1.0, "blend_mode": "difference"},
            3,
            (40, 20),
            (0, 0, 0),
        ),
    ],
)
def test_image_nodes_do_what_they_say(
    server: DevServer,
    class_type: str,
    inputs: dict[str, Any],
    count: int,
    size: tuple[int, int],
    colour: tuple[int, int, int],
) -> None:
    prompt_id = post(server, image_graph(class_type, **inputs))
    server.wait_for(finished())
    files = output(server, prompt_id)
    assert len(files) == count
    image = pixels(server, files[0])
    assert image.size == size
    assert image.getpixel((0, 0)) == colour


def test_the_custom_sampler_graph_of_flux_runs(server: DevServer) -> None:
    graph = {
        "1": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "2": node("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="sd3"),
        "3": node("VAELoader", vae_name="ae.safetensors"),
        "4": node("CLIPTextEncode", text="a fox", clip=["2", 0]),
        "5": node("FluxGuidance", conditioning=["4", 0], guidance=3.5),
        "6": node("BasicGuider", model=["1", 0], conditioning=["5", 0]),
        "7": node("RandomNoise", noise_seed=3),
        "8": node("BasicScheduler", model=["1", 0], scheduler="simple", steps=2, denoise=1.0),
        "9": node("KSamplerSelect", sampler_name="euler"),
        "10": node("EmptySD3LatentImage", width=64, height=32, batch_size=1),
        "11": node(
            "SamplerCustomAdvanced",
            noise=["7", 0],
            guider=["6", 0],
            sampler=["9", 0],
            sigmas=["8", 0],
            latent_image=["10", 0],
        ),
        "12": node("LatentUpscaleBy", samples=["11", 0], upscale_method="bicubic", scale_by=2.0),
        "13": node("VAEDecode", samples=["12", 0], vae=["3", 0]),
        "14": node("SaveImage", images=["13", 0], filename_prefix="flux"),
    }
    prompt_id = post(server, graph)
    server.wait_for(finished())
    assert server.prompts[0].status == "success"
    assert pixels(server, output(server, prompt_id)[0]).size == (128, 64)


def test_events_go_to_the_client_of_the_prompt_only(server: DevServer) -> None:
    mine, other = Client(server, "mine"), Client(server, "other")
    mine.run(plain())
    call(server, "POST", "/queue", json={"clear": True})
    seen = [other.receive() for _ in range(5)]
    assert {kind_of(message) for message in seen} == {"status"}


def test_a_reconnected_client_hears_what_runs(server: DevServer) -> None:
    first = Client(server)
    prompt_id = first.post(endless())
    first.until("progress_state")
    server.wait_for(running)
    first.until("executing")
    second = Client(server)
    assert kind_of(second.receive()) == "status"
    assert second.receive() == {"type": "executing", "data": {"node": "1"}}
    call(server, "POST", "/interrupt", json={"prompt_id": prompt_id})
    second.until("execution_interrupted")


def test_texts_of_the_client_are_in_the_file_whatever_they_are(server: DevServer) -> None:
    extra = {"extra_pnginfo": {"workflow": {"title": "ü"}, "": 1, "x" * 100: 2, "nul\0": 3}}
    prompt_id = post(server, plain(), extra_data=extra)
    server.wait_for(finished())
    image = pixels(server, output(server, prompt_id)[0])
    image.load()
    texts = {key: json.loads(value) for key, value in image.info.items()}
    assert texts.pop("prompt") == plain()
    assert texts == {"workflow": {"title": "ü"}, "?": 1, "x" * 79: 2, "nul?": 3}
