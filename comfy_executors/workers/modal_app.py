"""A ComfyUI on Modal that comfy-executors talks to: deploy this file, or a copy of it.

::

    modal deploy -m comfy_executors.workers.modal_app

The settings below may be changed in a copy, or given as environment variables when it is deployed:
`COMFY_MODAL_GPU=H100 modal deploy …`. The container with the GPU starts ComfyUI once and runs one
job after the other; a small one without a GPU answers all calls, so that asking how a job stands
wakes no GPU.
"""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from pathlib import Path
from typing import Any

import modal
import modal.experimental


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"COMFY_MODAL_{name}", default)


# What most people change.
APP_NAME = _setting("APP_NAME", "comfy-executors")
GPU = _setting("GPU", "L4")
COMFYUI_VERSION = _setting("COMFYUI_VERSION", "0.33.0")
# Names in ComfyUI's registry, `name` or `name@version`, with commas between them.
CUSTOM_NODES = _setting("CUSTOM_NODES", "")
# The models lie on a Volume of this name: `modal volume put comfyui-models FILE checkpoints/`.
MODELS_VOLUME = _setting("MODELS_VOLUME", "comfyui-models")

# What a job may cost: seconds, and containers at once.
TIMEOUT = int(_setting("TIMEOUT", "3600"))
SCALEDOWN_WINDOW = int(_setting("SCALEDOWN_WINDOW", "60"))
STARTUP_TIMEOUT = int(_setting("STARTUP_TIMEOUT", "600"))
MAX_CONTAINERS = int(_setting("MAX_CONTAINERS", "4"))
MIN_CONTAINERS = int(_setting("MIN_CONTAINERS", "0"))

# Without it everybody who knows the address can run workflows on your account.
REQUIRE_PROXY_AUTH = _setting("REQUIRE_PROXY_AUTH", "1") != "0"

# Further arguments of ComfyUI, such as `--lowvram`.
COMFYUI_ARGUMENTS = _setting("COMFYUI_ARGUMENTS", "")
# A ComfyUI that runs already, instead of one of this app: for trying the app on one's own machine.
COMFYUI_ADDRESS = _setting("COMFYUI_ADDRESS", "")

_PYTHON = "3.12"
_COMFYUI = Path("/root/comfy/ComfyUI")
_MODELS = Path("/models")
_PORT = 8188
_LIBRARY = ("jinja2>=3.1", "requests>=2.31", "websocket-client>=1.7", "tenacity>=8.2.3")
# The module is read again in the containers, and has to find the same settings there.
_SETTINGS = {name: value for name, value in os.environ.items() if name.startswith("COMFY_MODAL_")}


def _with_library(image: modal.Image) -> modal.Image:
    return (
        image.pip_install(*_LIBRARY)
        .env(_SETTINGS)
        # The version that is installed where the app is deployed from.
        .add_local_python_source("comfy_executors")
    )


def _comfyui_image() -> modal.Image:
    version = shlex.quote(COMFYUI_VERSION)
    install = f"comfy --skip-prompt install --fast-deps --nvidia --version {version}"
    image = (
        modal.Image.debian_slim(python_version=_PYTHON)
        .apt_install("git", "libgl1", "libglib2.0-0")
        .pip_install("comfy-cli>=1.5")
        .run_commands(install)
    )
    nodes = [name.strip() for name in CUSTOM_NODES.split(",") if name.strip()]
    if nodes:
        names = " ".join(map(shlex.quote, nodes))
        image = image.run_commands(f"comfy node install --fast-deps {names}")
    return _with_library(image)


web_image = _with_library(
    modal.Image.debian_slim(python_version=_PYTHON).pip_install("fastapi>=0.110")
)
models = modal.Volume.from_name(MODELS_VOLUME, create_if_missing=True)
app = modal.App(APP_NAME)


@app.cls(
    image=_comfyui_image(),
    gpu=GPU,
    volumes={str(_MODELS): models},
    timeout=TIMEOUT,
    startup_timeout=STARTUP_TIMEOUT,
    scaledown_window=SCALEDOWN_WINDOW,
    min_containers=MIN_CONTAINERS,
    max_containers=MAX_CONTAINERS,
)
class ComfyUI:
    """The container with the GPU: one job at a time, since ComfyUI runs one at a time, too."""

    @modal.enter()
    def start(self) -> None:
        """Start ComfyUI, and wait until it answers."""
        from comfy_executors.workers.comfy_process import ComfyProcess, write_model_paths
        from comfy_executors.workers.modal_backend import ModalPlaces
        from comfy_executors.workers.modal_container import GpuContainer

        comfyui = None
        if not COMFYUI_ADDRESS:
            paths = write_model_paths(_MODELS, Path("/tmp/model_paths.yaml"))  # noqa: S108
            arguments = ["--port", str(_PORT), "--extra-model-paths-config", str(paths)]
            command = [sys.executable, "main.py", *arguments, *shlex.split(COMFYUI_ARGUMENTS)]
            comfyui = ComfyProcess(command, _COMFYUI)
        self.places = ModalPlaces(APP_NAME)
        self.container = GpuContainer(
            COMFYUI_ADDRESS or f"127.0.0.1:{_PORT}",
            comfyui,
            startup_timeout=STARTUP_TIMEOUT,
            timeout=TIMEOUT,
        )

    @modal.method()
    def run(self, document: dict[str, Any]) -> dict[str, Any]:
        """Run one job document and return its envelope."""
        from comfy_executors.workers.modal_backend import ModalChannel

        call_id = modal.current_function_call_id() or f"fc-local-{uuid.uuid4().hex}"
        envelope = self.container.run(document, ModalChannel(self.places, call_id))
        if self.container.is_sick and not modal.is_local():
            modal.experimental.stop_fetching_inputs()
        return envelope

    @modal.exit()
    def stop(self) -> None:
        """End ComfyUI with the container."""
        self.container.close()


@app.function(
    image=web_image,
    cpu=0.25,
    memory=512,
    timeout=300,
    scaledown_window=SCALEDOWN_WINDOW,
)
@modal.concurrent(max_inputs=100)
@modal.asgi_app(requires_proxy_auth=REQUIRE_PROXY_AUTH)
def web() -> Any:
    """Answer all calls; jobs go to the container with the GPU."""
    from comfy_executors.workers.modal_web import create_web

    if modal.is_local():
        from comfy_executors.workers.engine import Engine
        from comfy_executors.workers.modal_job import JobRunner
        from comfy_executors.workers.modal_local import LocalBackend

        engine = Engine(COMFYUI_ADDRESS or f"127.0.0.1:{_PORT}")
        return create_web(LocalBackend(JobRunner(engine)))
    from comfy_executors.workers.modal_backend import ModalBackend, ModalPlaces

    return create_web(ModalBackend(ModalPlaces(APP_NAME), ComfyUI().run))


@app.function(image=web_image, schedule=modal.Period(days=1))
def clean() -> None:
    """Remove inputs and outputs of jobs that Modal has forgotten."""
    from comfy_executors.workers.modal_backend import ModalPlaces

    removed = ModalPlaces(APP_NAME).clean()
    print(f"{removed} old inputs and outputs removed")  # noqa: T201  what is printed is logged
