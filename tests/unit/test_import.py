"""What `import comfy_executors` costs beside its own modules."""

from __future__ import annotations

import json
import subprocess
import sys

# Whoever runs one image does not wait for these; blocking programs never need asyncio.
_UNWANTED = {"asyncio", "PIL", "aiohttp", "tqdm", "numpy", "multiprocessing", "sqlite3"}


def _imported(module: str) -> set[str]:
    # Where tornado is, which Jupyter brings, tenacity imports it, and it imports asyncio.
    program = (
        "import sys, json; sys.modules['tornado'] = None; "
        f"import {module}; print(json.dumps([*sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    return set(json.loads(ran.stdout))


def test_importing_leaves_extras_and_asyncio_alone() -> None:
    imported = _imported("comfy_executors")
    assert {"jinja2", "requests", "tenacity", "websocket"} <= imported
    assert not _UNWANTED & imported
    assert not {name for name in imported if name.startswith("comfy_executors.devserver")}


def test_modals_sdk_is_not_needed_to_call_an_app() -> None:
    imported = _imported("comfy_executors; comfy_executors.ModalWorkflowExecutor")
    assert "comfy_executors.executors.modal" in imported
    assert not {"modal", "fastapi", "uvicorn"} & imported


def test_the_unwanted_are_told_when_they_are_there() -> None:
    assert {"asyncio", "PIL"} <= _imported("asyncio, PIL")
