"""Every message in docs/troubleshooting.md is one that the library really gives, word for word.

A row's first cell is the message, with `…` where it differs from case to case; its second is the
class of the error, or `warning` for what goes to the log. Each row has a function here that brings
the message about, and each function has its row.
"""

from __future__ import annotations

import builtins
import logging
import re
import socket
import ssl
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    DummyWorkflowExecutor,
    ModalWorkflowExecutor,
    RunPodWorkflowExecutor,
    WorkflowTemplate,
)
from comfy_executors.devserver import DevServer
from comfy_executors.testing import ModalEdge, RunPodStub

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
_ROW = re.compile(r"^\| `(?P<message>[^`]+)` \| (?P<kind>`\w+`|a warning) \| .+ \|$", re.MULTILINE)
Told = tuple[str, str]


def rows() -> dict[str, str]:
    found = _ROW.findall(PAGE.read_text("utf-8"))
    assert len({message for message, _ in found}) == len(found), "a message has two rows"
    return {message: kind.strip("`") for message, kind in found}


class Kit:
    """What a case needs: a server, a folder, and what was logged."""

    def __init__(self, server: DevServer, folder: Path, log: pytest.LogCaptureFixture) -> None:
        self.server = server
        self.folder = folder
        self._log = log

    def fails(self, workflow: Any = None, *, address: str | None = None, **options: Any) -> Told:
        """Run something that fails, and return the error."""
        names = ("headers", "verify", "outage_timeout")
        made = {name: options.pop(name) for name in names if name in options}
        with ComfyServerWorkflowExecutor(address or self.server.address, **made) as executor:
            return error_of(lambda: submit(executor, workflow, **options).result())

    def warns(self, workflow: Any = None, *, only: str, **options: Any) -> Told:
        """Run something that succeeds, and return the warning that has a word in it."""
        with ComfyServerWorkflowExecutor(self.server.address) as executor:
            submit(executor, workflow, **options).result()
        return self.logged(only)

    def logged(self, only: str) -> Told:
        [record] = [r for r in self._log.records if only in r.getMessage()]
        assert record.levelno == logging.WARNING
        return "a warning", record.getMessage()


def error_of(call: Callable[[], object]) -> Told:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is compared
        call()
    return type(caught.value).__name__, str(caught.value)


def submit(executor: Any, workflow: Any, **options: Any) -> Any:
    template = workflow if isinstance(workflow, str) else None
    made = (
        WorkflowTemplate(template) if template else WorkflowTemplate.from_graph(workflow or GRAPH)
    )
    return executor.submit_workflow(made, **options)


def graph(**changes: Any) -> dict[str, Any]:
    canvas = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    return {
        "1": {
            "class_type": changes.pop("class_type", "EmptyImage"),
            "_meta": {"title": "Canvas"},
            "inputs": {**canvas, **changes},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "fox"}},
    }


def sampler(seconds: float = 0.0, fail: str = "") -> dict[str, Any]:
    return graph(class_type="BenchSampler", seed=0, steps=100, seconds=seconds, text="", fail=fail)


GRAPH = graph()
TEXT = """{
  "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64,
        "batch_size": 1, "color": {{ color }}}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "{{ name }}"}}
}"""

Case = Callable[[Kit], Told]
CASES: dict[str, Case] = {}


def case(message: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        assert message not in CASES
        CASES[message] = function
        return function

    return add


# Reaching a server.


@case("http://… cannot be reached: Connection refused; check the address, and that the server runs")
def _(kit: Kit) -> Told:
    return kit.fails(address="localhost:1")


@case(
    "http://… cannot be reached: Name or service not known; check the address, and that the server runs"
)
def _(kit: Kit) -> Told:
    def resolve(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        return kit.fails(address="gpu-bxo")


@case("http://… answers GET /prompt with 401: pass headers= or auth=")
def _(kit: Kit) -> Told:
    with DevServer(headers={"Authorization": "Bearer secret"}) as server:
        return kit.fails(address=server.address)


@case("http://… answers GET /prompt with 401: is the key right?")
def _(kit: Kit) -> Told:
    with DevServer(headers={"Authorization": "Bearer secret"}) as server:
        return kit.fails(address=server.address, headers={"Authorization": "Bearer other"})


@case(
    "http://… answers /prompt with an HTML page: no ComfyUI server, or a proxy or login page in front of it; check the address and its path"
)
def _(kit: Kit) -> Told:
    kit.server.faults.fail("GET", "/prompt", status=200, body="<html>Log in</html>")
    return kit.fails()


@case(
    "http://… answers GET /prompt with 404: an HTML page, not an answer of ComfyUI's API; check the address and its path"
)
def _(kit: Kit) -> Told:
    kit.server.faults.fail("GET", "/prompt", status=404, body="<html>nginx</html>")
    return kit.fails()


@case("http://… redirects GET /prompt to https://…: use that address")
def _(kit: Kit) -> Told:
    where = {"Location": "https://example.com/prompt"}
    kit.server.faults.fail("GET", "/prompt", status=302, headers=where)
    return kit.fails()


@case(
    "https://… TLS failed: …CERTIFICATE_VERIFY_FAILED…; pass verify= with the path of the CA that signed its certificate"
)
def _(kit: Kit) -> Told:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with DevServer(ssl_context=context) as server:
        return kit.fails(address=server.url)


@case("https://… TLS failed: …; it speaks http, not https")
def _(kit: Kit) -> Told:
    return kit.fails(address=f"https://{kit.server.address}")


@case("http://… was not ready within … s")
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor("localhost:1") as executor:
        return error_of(lambda: executor.wait_until_ready(timeout=0.2))


@case("http://… answers GET /view with 502: …; trying again for 60 s")
def _(kit: Kit) -> Told:
    kit.server.faults.fail("GET", "/view", status=502)
    return kit.warns(only="trying again")


@case("no websocket to http://… (503): polling instead")
def _(kit: Kit) -> Told:
    kit.server.faults.refuse_websockets = True
    return kit.warns(only="websocket")


# Templates and inputs.


@case(
    "missing variables: color; unknown variables: colour (did you mean color?); the template has color, name"
)
def _(kit: Kit) -> Told:
    return kit.fails(TEXT, colour=255, name="x")


@case("line …, column …: the rendered text is not a JSON workflow: …")
def _(kit: Kit) -> Told:
    return kit.fails(TEXT.replace('"2": {', '"2" {'), color=1, name="x")


@case("line …: …")
def _(kit: Kit) -> Told:
    return kit.fails(TEXT.replace("{{ color }}", "{{ color | hex }}"), color=1, name="x")


@case(
    "this workflow is in ComfyUI's UI format, which its API does not take; export it in ComfyUI with Workflow > Export (API); …"
)
def _(kit: Kit) -> Told:
    return kit.fails({"nodes": [], "links": []})


@case("the workflow is wrapped in …; only what stands in there is the workflow")
def _(kit: Kit) -> Told:
    return kit.fails({"prompt": GRAPH})


@case("Node 2 (SaveImage), input images: takes output 0 of node 7, which is not in the workflow")
def _(kit: Kit) -> Told:
    return kit.fails({**GRAPH, "2": {**GRAPH["2"], "inputs": {"images": ["7", 0]}}})


@case(
    "line …: variable color cannot be written into a workflow: JSON has no place for the type set…"
)
def _(kit: Kit) -> Told:
    return kit.fails(TEXT, color={1, 2}, name="x")


@case(
    "workflow_template must be a WorkflowTemplate, not dict: use WorkflowTemplate.from_file or from_graph"
)
def _(kit: Kit) -> Told:
    with DummyWorkflowExecutor() as executor:
        return error_of(lambda: executor.submit_workflow(GRAPH))  # type: ignore[arg-type]


@case("submit_workflow has no argument num_sample: did you mean num_samples?")
def _(kit: Kit) -> Told:
    return kit.fails(TEXT, color=1, name="x", num_sample=4)


@case(
    "num_samples=… at … a batch is more than the 1,000,000 batches that one run may have: divide it into several runs"
)
def _(kit: Kit) -> Told:
    return kit.fails(num_samples=3_000_000_000)


@case("1 input images were given, but the template uses neither input_images nor input_images_dir")
def _(kit: Kit) -> Told:
    return kit.fails(input_images=[b"an image"])


@case("unknown variables: prompt; the template has no variables; …")
def _(kit: Kit) -> Told:
    return kit.fails(prompt="a fox")


@case(
    "missing variables: input_images; the template has color, input_images; pass input_images=[…]"
)
def _(kit: Kit) -> Told:
    return kit.fails(TEXT.replace("{{ name }}", "{{ input_images[0] }}"), color=1)


@case("cannot read the input image '…': No such file or directory")
def _(kit: Kit) -> Told:
    return kit.fails(input_images=["gone.png"])


@case("input_images is a list of images, not one bytes: write input_images=[image]")
def _(kit: Kit) -> Told:
    return kit.fails(input_images=b"an image")


# Refused by the server.


@case(
    'Node 4 "Load Checkpoint" (CheckpointLoaderSimple), input ckpt_name: "sd_xl.safetensors" is not on the server; nearest: …'
)
def _(kit: Kit) -> Told:
    loader = {
        "class_type": "CheckpointLoaderSimple",
        "_meta": {"title": "Load Checkpoint"},
        "inputs": {"ckpt_name": "sd_xl.safetensors"},
    }
    return kit.fails(
        {"4": loader, "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}}
    )


@case(
    "Node … (MagicUpscaler): the server has no such node class (is its custom node package installed there?); nearest: …"
)
def _(kit: Kit) -> Told:
    return kit.fails(graph(class_type="MagicUpscaler"))


@case("Node … (EmptyImage), input width: -5 is below the minimum of 1")
def _(kit: Kit) -> Told:
    return kit.fails(graph(width=-5))


@case("Node … (EmptyImage), input height: is required and missing…")
def _(kit: Kit) -> Told:
    return kit.fails({"1": {**GRAPH["1"], "inputs": {"width": 64}}, "2": GRAPH["2"]})


@case(
    "node … (PreviewImage) makes only previews: pass include_previews=True, or save with a SaveImage node"
)
def _(kit: Kit) -> Told:
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    return kit.fails({"1": GRAPH["1"], "2": preview})


# While it runs.


@case("Node … failed: RuntimeError: out of memory")
def _(kit: Kit) -> Told:
    return kit.fails(sampler(fail="out of memory"))


@case("somebody interrupted prompt … on http://…")
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        run = submit(executor, sampler(seconds=20))
        kit.server.wait_for(lambda server: [p.status for p in server.prompts] == ["running"])
        requests.post(f"{kit.server.url}/interrupt", timeout=10)
        return error_of(run.result)


@case(
    "http://… has prompt … neither in its queue nor in its history: it was restarted, or somebody cleared its queue"
)
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        run = submit(executor, sampler(seconds=20))
        for _number in range(3):
            kit.server.wait_for(lambda server: "running" in [p.status for p in server.prompts])
            kit.server.restart()
        return error_of(run.result)


@case("the run's timeout of … s passed")
def _(kit: Kit) -> Told:
    return kit.fails(sampler(seconds=20), timeout=0.2)


@case("the batch_timeout of … s passed")
def _(kit: Kit) -> Told:
    return kit.fails(sampler(seconds=20), batch_timeout=0.2)


@case("job … ran longer than its execution timeout of … s: …")
def _(kit: Kit) -> Told:
    with (
        ModalEdge.in_front_of(kit.server.address) as edge,
        ModalWorkflowExecutor(edge.url, edge.key, edge.secret, execution_timeout=0.5) as executor,
    ):
        return error_of(submit(executor, sampler(seconds=20)).result)


@case("job … waited … s for a worker: …")
def _(kit: Kit) -> Told:
    with (
        RunPodStub() as stub,
        RunPodWorkflowExecutor(
            stub.endpoint_id, stub.api_key, stub.url, queue_timeout=1.0
        ) as executor,
    ):
        return error_of(submit(executor, sampler()).result)


@case("the run was cancelled")
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        run = submit(executor, sampler(seconds=20))
        run.cancel()
        return error_of(run.result)


@case("cancelled because another batch failed")
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address, max_workers=1) as executor:
        run = submit(executor, sampler(fail="x"), num_samples=3)
        error_of(run.result)
    return type(run.errors[2]).__name__, str(run.errors[2])


@case(
    "http://… answers /view of … with an HTML page instead of the file: a proxy or login page in front of it, or a file that is empty there"
)
def _(kit: Kit) -> Told:
    kit.server.faults.fail("GET", "/view", status=200, body="<html>", times=None)
    return kit.fails(outage_timeout=0.1)


@case("http://… does not have … of node …: 404")
def _(kit: Kit) -> Told:
    kit.server.faults.fail("GET", "/view", status=404, times=None)
    return kit.fails()


# Waiting, saving and closing.


@case("… of … batches were done after … s; the run goes on")
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        run = submit(executor, sampler(seconds=20))
        told = error_of(lambda: run.result(timeout=0.1))
        run.cancel()
        return told


@case(
    "… batches were handed out by iteration and are not kept: ask for result() before iterating, or keep the images yourself"
)
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        run = submit(executor, GRAPH, num_samples=2)
        next(run)
        return error_of(run.result)


@case("ComfyServerWorkflowExecutor is closed")
def _(kit: Kit) -> Told:
    executor = ComfyServerWorkflowExecutor(kit.server.address)
    executor.close()
    return error_of(lambda: submit(executor, GRAPH))


@case("output_dir … is a file, not a folder")
def _(kit: Kit) -> Told:
    (kit.folder / "out").write_text("a file")
    return kit.fails(output_dir=kit.folder / "out")


@case("cannot save into …: …")
def _(kit: Kit) -> Told:
    return kit.fails(output_dir="/proc/out")


@case("cannot save '…': …")
def _(kit: Kit) -> Told:
    (kit.folder / "out").mkdir()
    (kit.folder / "out" / "foxes").touch()  # where a folder is to be
    changed = graph()
    changed["2"]["inputs"]["filename_prefix"] = "foxes/fox"
    return kit.fails(changed, output_dir=kit.folder / "out")


@case("Pillow is not installed: run pip install 'comfy-executors[pillow]'")
def _(kit: Kit) -> Told:
    really_import = builtins.__import__

    def without_pillow(name: str, *arguments: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return really_import(name, *arguments)

    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        [image] = submit(executor, GRAPH).result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", without_pillow)
        return error_of(lambda: image.image)


@case("no RunPod key: pass api_key= or set RUNPOD_API_KEY")
def _(kit: Kit) -> Told:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUNPOD_API_KEY", raising=False)
        return error_of(lambda: RunPodWorkflowExecutor("abc123def456"))


# Warnings.


@case("prompt … on http://… made 2 of 8 images")
def _(kit: Kit) -> Told:
    template = TEXT.replace('"batch_size": 1', '"batch_size": {{ [batch_size, 2] | min }}')
    return kit.warns(template, color=1, name="x", num_samples=8, batch_size=8, only="made")


@case(
    "the 4 batches have the same seeds: a server answers all but the first from its cache, with the same images"
)
def _(kit: Kit) -> Told:
    return kit.warns(num_samples=4, only="same seeds")


@case("no seed was set: node … takes its own from node … (…); write {{ seed }} there")
def _(kit: Kit) -> Told:
    workflow = {**sampler(), "3": {"class_type": "PrimitiveInt", "inputs": {"value": 4}}}
    workflow["1"]["inputs"].update(seed=["3", 0], steps=["3", 0])
    return kit.warns(workflow, seed=7, only="no seed")


@case(
    "node … makes 4 images at once and the template has no {{ batch_size }}: expect 8 images, not 2"
)
def _(kit: Kit) -> Told:
    return kit.warns(graph(batch_size=4), num_samples=2, randomize_seed=False, only="at once")


@case("1 of 1 batches failed, and nobody looked at the run; batch 0: …")
def _(kit: Kit) -> Told:
    with ComfyServerWorkflowExecutor(kit.server.address) as executor:
        submit(executor, sampler(fail="x"))
    return kit.logged("nobody looked")


@case("the run made no image but 1 other outputs; they are on run.outputs()")
def _(kit: Kit) -> Told:
    text = {"1": {"class_type": "PreviewAny", "inputs": {"source": "hello"}}}
    return kit.warns(text, only="no image")


@case(
    "<ComfyServerWorkflowExecutor http://… batch_size=1 max_workers=4 runs=1> was not closed: cancelling 1 unfinished runs; use it with …"
)
def _(kit: Kit) -> Told:
    program = f"""
        from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate
        executor = ComfyServerWorkflowExecutor({kit.server.address!r})
        executor.submit_workflow(WorkflowTemplate.from_graph({sampler(seconds=20)!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return "a warning", done.stderr.strip()


@pytest.fixture
def kit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Kit]:
    with DevServer() as server:
        yield Kit(server, tmp_path, caplog)


def pattern_of(message: str) -> str:
    return ".+".join(re.escape(part) for part in message.split("…"))


@pytest.mark.parametrize("message", CASES)
def test_a_message_of_the_page_is_the_one_that_is_given(message: str, kit: Kit) -> None:
    kind, told = CASES[message](kit)
    assert re.fullmatch(pattern_of(message), told, re.DOTALL), told
    assert kind == rows()[message]


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert set(rows()) == set(CASES)
