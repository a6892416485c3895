"""The ComfyUI server of a container, as a process of its own."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 10.0
# The folders of models that ComfyUI knows; one that is not there is no error to it.
MODEL_FOLDERS = (
    "audio_encoders",
    "checkpoints",
    "clip",
    "clip_vision",
    "configs",
    "controlnet",
    "diffusion_models",
    "embeddings",
    "gligen",
    "hypernetworks",
    "latent_upscale_models",
    "loras",
    "model_patches",
    "photomaker",
    "style_models",
    "text_encoders",
    "unet",
    "upscale_models",
    "vae",
    "vae_approx",
)
# What such a configuration may name, and the names in it that are none of folders.
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SETTINGS = {"base_path", "is_default"}


class ComfyProcess:
    """Starts ComfyUI, again where it has died, and ends it. Any thread may call.

    Args:
        command: What starts it.
        directory: Where; None takes the present one.

    Attributes:
        starts: How often it was started.
    """

    def __init__(self, command: Sequence[str], directory: Path | None = None) -> None:
        self._command = [*command]
        self._directory = directory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def exit_code(self) -> int | None:
        """With what it ended, or None while it runs."""
        with self._lock:
            return None if self._process is None else self._process.poll()

    def ensure_running(self) -> None:
        """Start it unless it runs; it takes a while until it answers.

        Raises:
            OSError: It cannot be started.
        """
        with self._lock:
            if self._process is not None:
                if self._process.poll() is None:
                    return
                logger.error("ComfyUI ended with %s and is started again", self._process.returncode)
            # What it writes goes to the log of the container.
            self._process = subprocess.Popen(self._command, cwd=self._directory)  # noqa: S603
            self.starts += 1

    def close(self) -> None:
        """End it; it is gone when this returns."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_model_paths(models: Path, target: Path) -> Path:
    """Write a configuration that has ComfyUI look for models in another folder, too.

    Args:
        models: The folder, with `checkpoints`, `loras` and so on in it. All folders that it has
            now are shown, under their names.
        target: The file to be written, for `--extra-model-paths-config`.

    Returns:
        That file.
    """
    # Custom nodes have folders of their own, which only the disk can tell.
    found = [path.name for path in models.iterdir() if path.is_dir()] if models.is_dir() else []
    own = [name for name in found if _FOLDER.fullmatch(name) and name not in _SETTINGS]
    folders = {name: name for name in (*MODEL_FOLDERS, "custom_nodes", *sorted(own))}
    # JSON is YAML, too.
    target.write_text(json.dumps({"models": {"base_path": str(models), **folders}}, indent=2))
    return target
