"""The node classes that the server offers, as `GET /object_info` describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from typing import Any

from comfy_executors.devserver.files import Folders, UnsafePathError

# Importing them registers the nodes.
for _module in ("image_nodes", "sampling_nodes", "output_nodes", "bench_nodes"):
    import_module(f"comfy_executors.devserver.{_module}")

MODEL_FOLDERS = (
    "checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision",
    "style_models", "embeddings", "diffusers", "vae_approx", "controlnet", "gligen",
    "upscale_models", "latent_upscale_models", "custom_nodes", "datasets", "hypernetworks",
    "photomaker", "classifiers", "model_patches", "audio_encoders", "background_removal",
    "frame_interpolation", "geometry_estimation", "optical_flow", "detection",
)  # fmt: skip
_MODEL_INPUTS = {
    ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("DualCLIPLoader", "clip_name1"): "text_encoders",
    ("DualCLIPLoader", "clip_name2"): "text_encoders",
    ("VAELoader", "vae_name"): "vae",
    ("LoraLoader", "lora_name"): "loras",
    ("LoraLoaderModelOnly", "lora_name"): "loras",
}
_IMAGE_INPUTS = (("LoadImage", "image"), ("LoadImageMask", "image"))


class Catalogue:
    """The descriptions of the nodes and the names of the models.

    Args:
        checkpoints: The names that `CheckpointLoaderSimple` offers.
        folders: Whose input folder `LoadImage` offers.
    """

    def __init__(self, checkpoints: Sequence[str], folders: Folders) -> None:
        self._folders = folders
        self.custom_checks = dict.fromkeys(_IMAGE_INPUTS, self._check_image)
        self.models: dict[str, list[str]] = {folder: [] for folder in MODEL_FOLDERS}
        self.models["checkpoints"] = list(checkpoints)
        self.models["diffusion_models"] = ["flux1-dev.safetensors"]
        self.models["text_encoders"] = ["clip_l.safetensors", "t5xxl_fp16.safetensors"]
        self.models["loras"] = ["example_lora.safetensors"]
        self.models["vae"] = ["ae.safetensors"]
        text = files(__package__).joinpath("object_info.json").read_text(encoding="utf-8")
        self.nodes: dict[str, Any] = json.loads(text)
        for (class_type, name), folder in _MODEL_INPUTS.items():
            self.nodes[class_type]["input"]["required"][name][0].extend(self.models[folder])

    def describe(self, class_type: str | None = None) -> Mapping[str, Any]:
        """Return the descriptions of one class, or of all; of an unknown class none."""
        if class_type in (None, *(image_class for image_class, _ in _IMAGE_INPUTS)):
            self._offer_images()
        if class_type is None:
            return self.nodes
        return {class_type: self.nodes[class_type]} if class_type in self.nodes else {}

    def _offer_images(self) -> None:
        names = self._folders.input_images()
        for class_type, name in _IMAGE_INPUTS:
            self.nodes[class_type]["input"]["required"][name][0] = names

    def _check_image(self, name: object) -> str | None:
        """Return what is wrong with the name of an input image, or None."""
        try:
            exists = self._folders.annotated(str(name)).is_file()
        except (UnsafePathError, OSError):
            exists = False
        return None if exists else f"Invalid image file: {name}"
