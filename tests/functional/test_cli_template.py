"""`comfy-executors template`, from an export to images; and how `check` points into templates."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from comfy_executors import WorkflowTemplate
from comfy_executors.cli import main
from comfy_executors.devserver import DevServer

EXPORTS = Path(__file__).parents[1] / "exports"
SD15 = EXPORTS / "api/sd15.json"
HOSTILE = 'a "fox"\n{{ x }}'


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMFYUI_URL", raising=False)


def ui_export(path: Path, kind: str = "EmptyImage") -> Path:
    """Save the workflow of an empty image that is saved, as the editor does."""
    nodes = [
        {"id": 1, "type": kind, "mode": 0, "inputs": [], "outputs": [{"links": [9]}],
         "widgets_values": [64, 32, 1, 255]},
        {"id": 2, "type": "SaveImage", "mode": 0, "inputs": [{"name": "images", "link": 9}],
         "widgets_values": ["from the editor"]},
    ]  # fmt: skip
    links = [[9, 1, 0, 2, 0, "IMAGE"]]
    path.write_text(json.dumps({"nodes": nodes, "links": links, "last_node_id": 2}), "utf-8")
    return path


def test_from_an_export_to_images(server: DevServer, capsys: pytest.CaptureFixture[str]) -> None:
    graph = json.loads(SD15.read_text("utf-8"))
    known = requests.get(f"{server.url}/object_info", timeout=30).json()
    choices = known["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    graph["4"]["inputs"]["ckpt_name"] = choices[0]
    Path("export.json").write_text(json.dumps(graph), "utf-8")
    assert main(["template", "export.json", "-o", "mine.json.jinja"]) == 0
    told = capsys.readouterr()
    assert "7 nodes written to mine.json.jinja" in told.err
    assert told.out.splitlines()[1].split()[:2] == ["prompt", '"beautiful']
    run = ["run", "mine.json.jinja", "--server", server.url, "--var", f"prompt={HOSTILE}"]
    sizes = ["--var-json", "width=64", "--var-json", "height=64", "--var-json", "steps=1"]
    assert main([*run, *sizes, "--num-samples", "2", "--batch-size", "2"]) == 0
    assert len(list(Path("out").iterdir())) == 2
    posted = server.prompts[-1].graph
    assert posted["6"]["inputs"]["text"] == HOSTILE
    assert posted["5"]["inputs"]["batch_size"] == 2
    assert posted["7"] == graph["7"]


def test_to_stdout_with_the_table_beside_it() -> None:
    command = [sys.executable, "-m", "comfy_executors", "template", str(SD15)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0
    template = WorkflowTemplate(done.stdout)
    assert template.render(batch_size=1) == json.loads(SD15.read_text("utf-8"))
    table = done.stderr.splitlines()
    assert table[0].split() == ["variable", "value", "in"]
    assert table[5].split()[:4] == ["batch_size", "required,", "was", "1"]
    assert table[-1].startswith("literal ")
    assert table[-1].endswith('Node 3 "KSampler" (KSampler), input seed')


def test_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", str(SD15), "--output", "t.jinja", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {line["name"]: line for line in lines if line["event"] == "variable"}
    assert by_name["batch_size"]["required"] is True
    assert (by_name["steps"]["required"], by_name["steps"]["value"]) == (False, 20)
    assert by_name["negative_prompt"]["places"] == [
        {
            "node": "7",
            "class_type": "CLIPTextEncode",
            "title": "CLIP Text Encode (Prompt)",
            "input": "text",
        }
    ]
    assert lines[-1] == {"event": "end", "path": "t.jinja", "nodes": 7}
    assert main(["template", str(SD15), "--json"]) == 2
    assert "add --output FILE" in capsys.readouterr().err


def test_a_workflow_of_the_editor(server: DevServer, capsys: pytest.CaptureFixture[str]) -> None:
    export = str(ui_export(Path("ui.json")))
    info = requests.get(f"{server.url}/object_info", timeout=30)
    Path("object_info.json").write_bytes(info.content)
    assert main(["template", export, "-o", "a.jinja", "--server", server.url]) == 0
    assert main(["template", export, "-o", "b.jinja", "--object-info", "object_info.json"]) == 0
    assert Path("a.jinja").read_bytes() == Path("b.jinja").read_bytes()
    graph = WorkflowTemplate.from_file("a.jinja").render(batch_size=3)
    assert graph["1"]["inputs"] == {"width": 64, "height": 32, "batch_size": 3, "color": 255}
    assert graph["2"]["inputs"] == {"filename_prefix": "from the editor", "images": ["1", 0]}
    capsys.readouterr()
    assert main(["template", export]) == 2
    assert "Workflow > Export (API)" in capsys.readouterr().err


def test_a_file_is_not_written_over_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.jinja").write_text("by hand", "utf-8")
    assert main(["template", str(SD15), "-o", "mine.jinja"]) == 2
    assert "--force writes over it" in capsys.readouterr().err
    assert Path("mine.jinja").read_text("utf-8") == "by hand"
    Path("mine.jinja").chmod(0o600)
    assert main(["template", str(SD15), "-o", "mine.jinja", "--force"]) == 0
    assert Path("mine.jinja").stat().st_mode & 0o777 == 0o600
    assert Path("mine.jinja").read_text("utf-8").startswith("{# Required: batch_size.")


def test_the_body_of_a_request_is_unwrapped(capsys: pytest.CaptureFixture[str]) -> None:
    graph = json.loads(SD15.read_text("utf-8"))
    Path("body.json").write_text(json.dumps({"prompt": graph, "client_id": "a"}), "utf-8")
    assert main(["template", "body.json"]) == 0
    assert WorkflowTemplate(capsys.readouterr().out).render(batch_size=1) == graph


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_written_whole_is_not_written(force: bool) -> None:
    target = Path("mine.jinja")
    if force:
        target.write_text("by hand", "utf-8")
    before = list(Path().iterdir())
    arguments = f"template '{SD15}' -o {target}" + " --force" * force
    # A limit stands for a full disk.
    command = f"ulimit -f 0; '{sys.executable}' -B -m comfy_executors {arguments}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: cannot write {target}: File too large\n")
    assert list(Path().iterdir()) == before
    assert not force or target.read_text("utf-8") == "by hand"


def test_a_pipe_and_a_link_are_written_to() -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("real.jinja")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(["template", str(SD15), "-o", "pipe", "--force"]) == 0
        piped = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert main(["template", str(SD15), "-o", "link", "--force"]) == 0
    assert Path("link").is_symlink()
    assert Path("real.jinja").read_bytes() == piped
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


def write_bad_files() -> None:
    ui_export(Path("ui.json"))
    ui_export(Path("unknown.json"), "EmptyImge")
    Path("no.json").write_text("{", "utf-8")
    Path("text.json").write_bytes(b"\xff")
    Path("list.json").write_text("[]", "utf-8")
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("template.jinja").write_text("{{ x }}", "utf-8")


WRONG = [
    (["absent.json"], 2, "cannot read the export absent.json"),
    (["no.json"], 2, "no.json is no export, which is JSON"),
    (["text.json"], 2, "text.json is no export"),
    (["picture.png"], 2, "a picture has to be opened in ComfyUI, and its workflow exported"),
    (["template.jinja"], 2, "template.jinja is no export"),
    (["list.json"], 2, "list.json: a workflow is an object of nodes"),
    ([str(SD15), "-o", "absent/t.jinja"], 2, "cannot write absent/t.jinja"),
    (["ui.json", "--object-info", "absent.json"], 2, "cannot read absent.json"),
    (["ui.json", "--object-info", "list.json"], 2, "list.json is not what a server answers"),
    (["ui.json", "--server", "127.0.0.1:1"], 3, "cannot be reached"),
    (["ui.json", "--server", "http://"], 2, "http://"),
    (["unknown.json", "--object-info", "RECORDED"], 2, "Node 1 (EmptyImge): the description"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG)
def test_what_is_wrong_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    write_bad_files()
    recorded = str(EXPORTS.parent / "recordings/comfyui-0.33.0/object_info.json")
    given = [recorded if argument == "RECORDED" else argument for argument in arguments]
    assert main(["template", *given]) == code
    told = capsys.readouterr()
    assert words in told.err
    assert told.out == ""


def test_a_graph_without_anything_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    export = str(EXPORTS / "api/nothing_to_change.json")
    assert main(["template", export, "-o", "t.jinja"]) == 0
    assert capsys.readouterr().out == "nothing in it looks like a variable\n"


# check


TEMPLATE = """{
  "1": {"class_type": "EmptyImage",
        "inputs": {"width": {{ width | default(64) }}, "hight": 64,
                   "batch_size": {{ batch_size }}, "color": 255}},
  "2": {"class_type": "SaveImge",
        "inputs": {"images": ["1", 0], "filename_prefix": "{{ name }}"}}
}
"""


def check(server: DevServer, *arguments: str) -> int:
    Path("t.jinja").write_text(TEMPLATE, "utf-8")
    return main(["check", "t.jinja", "--server", server.url, "--var", "name=x", *arguments])


def test_check_points_into_the_template(
    server: DevServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(server, "--var-json", "width=-1") == 2
    told = capsys.readouterr()
    problems = told.out.splitlines()
    assert [problem.partition(": Node ")[0] for problem in problems] == [
        "error: t.jinja, line 5, column 23",  # the class
        "error: t.jinja, line 2, column 3",  # the node, of which an input is missing
        "error: t.jinja, line 3, column 29",  # the value of the width
        "warning: t.jinja, line 3, column 65",  # the value of what is called otherwise now
    ]
    assert "nearest: SaveImage" in problems[0]
    assert "input height: is required and missing; it may be what hight was" in problems[1]
    assert "renamed it to height, which is missing" in problems[3]
    assert {"name: required", "width: default 64"} <= set(told.err.splitlines())


def test_check_points_into_the_template_in_json(
    server: DevServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(server, "--json") == 2
    events: list[Any] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0]["event"] == "variables"
    assert events[0]["variables"]["batch_size"] == "filled in by --batch-size"
    assert events[0]["defaults"] == {"width": 64}
    assert [(event["line"], event["column"]) for event in events[1:-1]] == [
        (5, 23),
        (2, 3),
        (3, 65),
    ]


def test_check_shows_the_node_that_a_link_misses(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.jinja").write_text(TEMPLATE.replace('["1", 0]', '["7", 0]'), "utf-8")
    assert main(["check", "t.jinja", "--var", "name=x"]) == 2
    told = capsys.readouterr().err
    assert '> 5 |   "2": {"class_type": "SaveImge",\n        ^\n' in told
    assert "takes output 0 of node 7, which is not in the workflow" in told
