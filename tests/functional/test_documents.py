"""Every code block of README.md and of docs/ runs, in the page's order, and does what it says.

- A page runs in an empty directory, and its `python` blocks share one namespace.
- `localhost:8188` stands for a dev server of the page's own; in what is printed, the other way.
- A block whose first line is a comment with nothing but a file name is written to that file.
- A `text` block is what the block before it prints; `...` in it stands for anything.
- `sh` blocks end at their first command that fails. One that starts `comfy-executors devserver`
  or `modal serve-local` is interrupted, as by Ctrl-C, when the server has said where it is.
- A block below `<!-- not run: reason -->` is not run; `NOT_RUN` lists all of them.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import comfy_executors
from comfy_executors.devserver import DevServer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DIRECTIVES = {"{toctree}", "{eval-rst}", "{literalinclude}", "{include}"}
SHOWN_ADDRESS = "localhost:8188"
SECONDS = 60
SERVERS = ("comfy-executors devserver", "comfy-executors modal serve-local")
NOT_RUN = {
    ("benchmarks.md", "python -m tests.benchmarks --short"),
    ("executors.md", "import signal\n\n"
     "signal.signal(signal.SIGTERM, signal.default_int_handler)"),
    ("django.md", "comfy-executors devserver --port 8188 --step-seconds 0.1"),
    ("django.md", "cd docs/examples/django\npython manage.py migrate\n"
     "gunicorn studio.wsgi  # or: python manage.py runserver"),
    ("django.md", "cd docs/examples/django\npython -m pytest"),
    ("README.md", "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]' "
     "&& .venv/bin/comfy-executors demo"),
    ("README.md", "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' "
     "&& .venv/bin/python -m pytest"),
    ("modal.md", 'from comfy_executors import ModalWorkflowExecutor, WorkflowTemplate\n'
     '\n'
     'template = WorkflowTemplate.from_file("workflow.json.jinja")\n'
     'with ModalWorkflowExecutor("https://me--comfy-executors-web.modal.run", batch_size=4) '
     'as executor:\n'
     '    for image in executor.submit_workflow(template, num_samples=16, prompt="a fox"):\n'
     '        image.save("out/")'),
    ("modal.md", "pip install 'comfy-executors[modal-app]'\n"
     'modal setup'),
    ("modal.md", 'modal volume create comfyui-models\n'
     'modal volume put comfyui-models sd_xl_base_1.0.safetensors checkpoints/\n'
     'modal volume ls comfyui-models checkpoints'),
    ("modal.md", 'modal deploy -m comfy_executors.workers.modal_app'),
    ("modal.md", 'modal workspace proxy-tokens create\n'
     'export MODAL_KEY=wk-...\n'
     'export MODAL_SECRET=ws-...'),
    ("modal.md", 'comfy-executors modal health https://me--comfy-executors-web.modal.run\n'
     'comfy-executors modal smoke https://me--comfy-executors-web.modal.run\n'
     'comfy-executors run workflow.json.jinja '
     '--modal https://me--comfy-executors-web.modal.run \\\n'
     "    --var prompt='a fox' --num-samples 8"),
    ("runpod.md", "from comfy_executors import RunPodWorkflowExecutor, WorkflowTemplate\n\n"
     'template = WorkflowTemplate.from_file("workflow.json.jinja")\n'
     'with RunPodWorkflowExecutor("abc123def456", batch_size=4) as executor:\n'
     '    for image in executor.submit_workflow(template, num_samples=16, prompt="a fox"):\n'
     '        image.save("out/")'),
    ("runpod.md", "docker build --platform linux/amd64 -f comfy_executors/workers/Dockerfile "
     "-t me/comfy-worker .\ndocker push me/comfy-worker"),
    ("runpod.md", "comfy-executors runpod health abc123def456\n"
     "comfy-executors runpod smoke abc123def456\n"
     "comfy-executors run workflow.json.jinja --runpod abc123def456 --var prompt='a fox' "
     "--num-samples 8"),
    ("runpod.md", 'with RunPodWorkflowExecutor("abc123def456") as executor:\n'
     '    for image in executor.attach("the-id-u1", num_batches=4):\n'
     '        image.save("out/")'),
    ("tutorial.md", "mkdir foxes && cd foxes\npython3 -m venv .venv && . .venv/bin/activate\n"
     "pip install '../comfy-executors[demo]'"),
}  # fmt: skip

_FENCE = re.compile(r"^ *```+ *(?P<language>\{?[\w-]*\}?)")
_FILE_NAME = re.compile(r"^(?:#|\{#) (?P<name>[\w./-]+\.\w+)(?: #\})?$")
_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")


def prose_of(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line in the page, and its marker."""

    language: str
    text: str
    line: int
    not_run: str | None

    @property
    def file_name(self) -> str | None:
        match = _FILE_NAME.match(self.text.split("\n", 1)[0])
        return match["name"] if match else None


def blocks_of(text: str) -> list[Block]:
    blocks = []
    lines = iter(enumerate(text.splitlines(), 1))
    marker = None
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            comment = re.match(r"<!-- not run: (.+) -->$", line)
            marker = comment[1] if comment else marker if not line.strip() else None
            continue
        inside = [inner for _, inner in _until_fence(lines)]
        blocks.append(Block(fence["language"], "\n".join(inside) + "\n", number + 1, marker))
        marker = None
    return blocks


def _until_fence(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if line.strip().startswith("```"):
            return
        yield number, line
    raise AssertionError("a fenced block has no end")


class Page:
    """Runs the blocks of one page."""

    def __init__(self, path: Path, server: DevServer) -> None:
        self._path = path
        self._server = server
        self._namespace: dict[str, Any] = {"__name__": "__main__"}

    def run(self) -> None:
        printed: str | None = None
        for block in blocks_of(self._path.read_text("utf-8")):
            where = f"{self._path.name}, line {block.line}"
            if block.not_run or block.language.startswith("{"):
                printed = None
            elif block.language == "text":
                assert printed is not None, f"{where}: nothing ran before this output"
                assert_printed(block.text, printed, where)
                printed = None
            else:
                printed = self._run_block(block).replace(self._server.address, SHOWN_ADDRESS)

    def _run_block(self, block: Block) -> str:
        text = block.text.replace(SHOWN_ADDRESS, self._server.address)
        if block.file_name:
            Path(block.file_name).write_text(text, "utf-8")
            return ""
        if block.language == "python":
            return self._run_python(text, block.line)
        assert block.language == "sh", f"{self._path.name}, line {block.line}: {block.language!r}"
        if text.startswith(SERVERS):
            return run_until_interrupted(text)
        return run_shell(text, self._server.address)

    def _run_python(self, text: str, line: int) -> str:
        # Empty lines in front, so that a traceback shows the page's own lines.
        code = compile("\n" * (line - 1) + text, str(self._path), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self._namespace)
        return printed.getvalue()


def assert_printed(expected: str, printed: str, where: str) -> None:
    matches = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
    assert matches, f"{where}: the page shows\n{expected}\nand this was printed\n{printed}"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **more}


def run_shell(text: str, address: str) -> str:
    done = subprocess.run(
        ["sh", "-e", "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        env=environment(COMFYUI_URL=address),
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode} of\n{text}\n{done.stdout}"
    return done.stdout


def run_until_interrupted(text: str) -> str:
    # A free port, because the one of the page may be taken.
    port = re.findall(r"--port (\d+)", text)[0]
    arguments = re.sub(r"--port \d+", "--port 0", text).split()
    arguments[0] = os.path.join(os.path.dirname(sys.executable), arguments[0])
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=environment(PYTHONUNBUFFERED="1")
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
    return re.sub(r":\d+", f":{port}", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "runpod.md":
        pytest.importorskip("runpod", reason="the RunPod SDK from 1.12 on needs Python 3.10")
    with DevServer(step_seconds=0.005) as server:
        Page(page, server).run()


def test_only_known_blocks_are_not_run() -> None:
    unrun = [
        (page.name, block.text.strip())
        for page in PAGES
        for block in blocks_of(page.read_text("utf-8"))
        if block.not_run
    ]
    assert sorted(unrun) == sorted(NOT_RUN)


def test_no_code_hides_from_the_tests() -> None:
    # Indented code and other languages would be shown as code and never run. What is included is
    # run by test_recipes.py and by the Django example's own tests.
    for page in PAGES:
        blocks = blocks_of(page.read_text("utf-8"))
        languages = {block.language for block in blocks}
        assert languages <= {"python", "sh", "text", "jinja"} | DIRECTIVES
        assert not re.search(r"^\n(?: {4}|\t)\S", prose_of(page.read_text("utf-8")), re.MULTILINE)


def test_links_lead_to_pages_and_headings() -> None:
    for page in PAGES:
        for link in _LINK.finditer(prose_of(page.read_text("utf-8"))):
            target = page.parent / link["path"] if link["path"] else page
            assert target.exists(), f"{page.name}: {link[0]}"
            if link["anchor"]:
                assert link["anchor"] in anchors_of(target), f"{page.name}: {link[0]}"


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose_of(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_reference_names_everything_public() -> None:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    missing = [name for name in comfy_executors.__all__ if f".{name}\n" not in text]
    assert missing == ["__version__"]


def test_a_page_that_shows_a_wrong_output_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n", "utf-8")
    with DevServer() as server, pytest.raises(AssertionError, match="line 6: the page shows"):
        Page(page, server).run()


def test_a_page_whose_code_raises_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\n1 / 0\n```\n", "utf-8")
    with DevServer() as server, pytest.raises(ZeroDivisionError) as caught:
        Page(page, server).run()
    assert caught.traceback[-1].lineno == 3
