"""What the dev server refuses: wrong graphs, and names that lead out of its folders."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devserver_client import (
    Client,
    call,
    dev_server,
    finished,
    get,
    node,
    plain,
    post,
    text_to_image,
)
from PIL import Image

from comfy_executors.devserver import DevServer


@pytest.fixture
def server() -> Iterator[DevServer]:
    with dev_server() as started:
        yield started


def rejected(server: DevServer, graph: Any) -> Any:
    response = call(server, "POST", "/prompt", json={"prompt": graph})
    assert response.status_code == 400
    return response.json()


def test_a_missing_model_is_answered_with_those_there_are(server: DevServer) -> None:
    graph = text_to_image()
    graph["4"]["inputs"]["ckpt_name"] = "absent.safetensors"
    (error,) = rejected(server, graph)["node_errors"]["4"]["errors"]
    assert error["type"] == "value_not_in_list"
    assert error["extra_info"]["received_value"] == "absent.safetensors"
    assert error["extra_info"]["input_config"][0] == [
        "sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly.safetensors",
    ]  # fmt: skip


def test_long_lists_of_models_are_left_out() -> None:
    with dev_server(checkpoints=[f"{i}.safetensors" for i in range(21)]) as server:
        graph = text_to_image()
        (error,) = rejected(server, graph)["node_errors"]["4"]["errors"]
        assert error["extra_info"]["input_config"] is None
        assert "(list of length 21)" in error["details"]


def test_a_node_missing_further_up_is_an_error_of_its_child(server: DevServer) -> None:
    graph = {**plain(), "1": node("ImageInvert", image=["9", 0])}
    errors = rejected(server, graph)["node_errors"]
    assert errors["1"]["errors"][0]["type"] == "exception_during_inner_validation"
    assert errors["1"]["dependent_outputs"] == ["2"]


def test_a_slot_that_is_not_there_is_an_error(server: DevServer) -> None:
    graph = plain()
    graph["2"]["inputs"]["images"] = ["1", 5]
    (error,) = rejected(server, graph)["node_errors"]["2"]["errors"]
    assert error["type"] == "exception_during_validation"
    assert error["extra_info"]["exception_type"] == "IndexError"


def test_a_cycle_of_three_is_named(server: DevServer) -> None:
    graph: dict[str, Any] = {
        "1": node("ImageInvert", image=["3", 0]),
        "2": node("ImageInvert", image=["1", 0]),
        "3": node("ImageInvert", image=["2", 0]),
        "4": node("SaveImage", images=["2", 0], filename_prefix="x"),
    }
    errors = rejected(server, graph)["node_errors"]
    assert set(errors) == {"1", "2", "3"}
    assert set(errors["1"]["errors"][0]["extra_info"]["cycle_nodes"]) == {"1", "2", "3"}


def test_a_cycle_beside_a_valid_output_does_not_hang(server: DevServer) -> None:
    cycle = {
        "5": node("ImageInvert", image=["6", 0]),
        "6": node("ImageInvert", image=["5", 0]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="never"),
    }
    post(server, {**plain(), **cycle})
    server.wait_for(finished())
    assert server.prompts[0].status == "success"
    assert server.prompts[0].executed_nodes == ["1", "2"]


def files_outside(server: DevServer) -> set[Path]:
    """Return what lies beside the three folders, and below the parent of the directory."""
    root = server.directory
    return {
        path
        for path in [*root.glob("*"), *root.parent.glob("evil*")]
        if path.name not in ("input", "output", "temp")
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../evil.png", {}),
        ("../../evil.png", {"subfolder": "a"}),
        ("evil.png", {"subfolder": ".."}),
        ("evil.png", {"subfolder": "/evil"}),
        ("evil.png", {"subfolder": "a/../../evil"}),
        ("evil.png", {"type": "../evil"}),
        ("..", {}),
        (".", {}),
        ("e" * 300 + ".png", {}),
    ],
)
def test_uploads_never_leave_their_folder(
    server: DevServer, name: str, fields: dict[str, str]
) -> None:
    response = call(server, "POST", "/upload/image", data=fields, files={"image": (name, b"data")})
    assert response.status_code == 400
    assert files_outside(server) == set()


def test_an_upload_through_a_link_is_refused(server: DevServer, tmp_path: Path) -> None:
    (server.directory / "input" / "link").symlink_to(tmp_path)
    response = call(
        server, "POST", "/upload/image", data={"subfolder": "link"}, files={"image": ("a.png", b"")}
    )
    assert response.status_code == 400
    assert list(tmp_path.iterdir()) == []


def test_an_upload_of_more_than_the_limit_is_413(server: DevServer) -> None:
    limit = get(server, "/features")["max_upload_size"]
    response = call(server, "POST", "/upload/image", files={"image": ("big.png", bytes(limit + 1))})
    assert response.status_code == 413
    assert not (server.directory / "input" / "big.png").exists()


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"filename": "../../etc/passwd"}, 400),
        ({"filename": "/etc/passwd"}, 400),
        ({"filename": "a\0b.png"}, 400),
        ({"filename": "secret", "subfolder": "link"}, 403),
        ({"filename": "secret", "subfolder": "/etc"}, 403),
        ({"filename": "x.png", "subfolder": "a/../../.."}, 403),
        ({"filename": "sub"}, 404),
        ({"filename": "x" * 5000}, 404),
    ],
)
def test_view_never_leaves_its_folder(
    server: DevServer, tmp_path: Path, query: dict[str, str], status: int
) -> None:
    (tmp_path / "secret").write_text("secret")
    (server.directory / "input" / "link").symlink_to(tmp_path)
    (server.directory / "input" / "sub").mkdir()
    response = call(server, "GET", "/view", params={"type": "input", **query})
    assert response.status_code == status


@pytest.mark.parametrize("prefix", ["../evil", "/evil", "a/../../evil", "evil\0", "..", "a/.."])
def test_a_file_name_prefix_never_leaves_the_output_folder(server: DevServer, prefix: str) -> None:
    post(server, plain(prefix=prefix))
    server.wait_for(finished())
    assert files_outside(server) == set()
    written = [path for path in (server.directory / "output").rglob("*") if path.is_file()]
    assert len(written) == (server.prompts[0].status == "success")


@pytest.mark.parametrize("name", ["../example.png", "/etc/hostname", "link/secret.png", "x\0"])
def test_load_image_reads_nothing_else(server: DevServer, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (server.directory / "input" / "link").symlink_to(tmp_path)
    graph = {"1": node("LoadImage", image=name), "2": node("PreviewImage", images=["1", 0])}
    (error,) = rejected(server, graph)["node_errors"]["1"]["errors"]
    assert error["type"] == "custom_validation_failed"


@pytest.mark.parametrize("directory", ["..", "/etc", "input/absent"])
def test_load_images_from_dir_stays_inside(server: DevServer, directory: str) -> None:
    graph = {
        "1": node("LoadImagesFromDir", directory=directory),
        "2": node("PreviewImage", images=["1", 0]),
    }
    client = Client(server)
    client.post(graph)
    error = client.until("execution_error")[-1]["data"]
    assert error["exception_type"] == "FileNotFoundError"


def test_a_page_that_was_uploaded_is_no_page(server: DevServer) -> None:
    page = b"<script>alert(1)</script>"
    call(server, "POST", "/upload/image", files={"image": ("evil.html", page)})
    response = call(server, "GET", "/view?filename=evil.html&type=input")
    assert response.content == page
    assert response.headers["Content-Type"] == "application/octet-stream"


def test_view_converts_for_previews(server: DevServer) -> None:
    response = call(server, "GET", "/view?filename=example.png&type=input&preview=webp;50")
    assert response.headers["Content-Type"] == "image/webp"
    assert Image.open(io.BytesIO(response.content)).format == "WEBP"


def test_head_of_view_tells_the_length(server: DevServer) -> None:
    response = call(server, "HEAD", "/view?filename=example.png&type=input")
    size = (server.directory / "input" / "example.png").stat().st_size
    assert response.headers["Content-Length"] == str(size)
