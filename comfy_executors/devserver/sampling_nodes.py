"""Nodes of the diffusion kind; none of them needs a model.

Models, text encoders and VAEs are names, a conditioning is its text, and a latent is what a
picture is painted from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from comfy_executors.devserver.image_nodes import resized
from comfy_executors.devserver.nodes import Images, NodeContext, NodeResult, node
from comfy_executors.devserver.painting import paint


@dataclass(frozen=True)
class Latent:
    """What `VAEDecode` makes images from.

    Args:
        width: Of the images, in pixels.
        height: Of the images, in pixels.
        batch_size: How many images.
        seed: The seed of the sampler; None when nothing was sampled.
        text: The text of the positive conditioning.
        source: The images that were encoded, or None.
        strength: How much of the source is painted over, from 0 to 1.
    """

    width: int
    height: int
    batch_size: int
    seed: int | None = None
    text: str = ""
    source: Images | None = None
    strength: float = 1.0

    def decoded(self) -> Images:
        return [self._image(index) for index in range(self.batch_size)]

    def _image(self, index: int) -> Image.Image:
        size = (self.width, self.height)
        below = None if self.source is None else self.source[index % len(self.source)]
        if below is None:
            below = Image.new("RGB", size, (128, 128, 128))
        elif below.size != size:
            below = below.resize(size)
        if self.seed is None:
            return below
        painted = paint(self.seed, index, self.text, self.width, self.height)
        return painted if self.strength >= 1 else Image.blend(below, painted, self.strength)


def _sampled(
    context: NodeContext, latent: Latent, seed: int, text: str, steps: int, strength: float
) -> Latent:
    context.steps(steps, context.step_seconds * steps)
    return replace(latent, seed=seed, text=text, strength=strength)


@node("CheckpointLoaderSimple")
def checkpoint_loader(context: NodeContext, ckpt_name: str) -> NodeResult:
    return NodeResult((ckpt_name, ckpt_name, ckpt_name))


@node("UNETLoader")
def unet_loader(context: NodeContext, unet_name: str, weight_dtype: str) -> NodeResult:
    return NodeResult((unet_name,))


@node("CLIPLoader")
def clip_loader(context: NodeContext, clip_name: str, **options: str) -> NodeResult:
    return NodeResult((clip_name,))


@node("DualCLIPLoader")
def dual_clip_loader(
    context: NodeContext, clip_name1: str, clip_name2: str, **options: str
) -> NodeResult:
    return NodeResult((f"{clip_name1}+{clip_name2}",))


@node("VAELoader")
def vae_loader(context: NodeContext, vae_name: str) -> NodeResult:
    return NodeResult((vae_name,))


@node("LoraLoader")
def lora_loader(
    context: NodeContext, model: str, clip: str, lora_name: str, **strengths: float
) -> NodeResult:
    return NodeResult((f"{model}+{lora_name}", f"{clip}+{lora_name}"))


@node("LoraLoaderModelOnly")
def lora_loader_model_only(
    context: NodeContext, model: str, lora_name: str, strength_model: float
) -> NodeResult:
    return NodeResult((f"{model}+{lora_name}",))


@node("CLIPTextEncode")
def clip_text_encode(context: NodeContext, text: str, clip: str) -> NodeResult:
    return NodeResult((text,))


@node("CLIPSetLastLayer")
def clip_set_last_layer(context: NodeContext, clip: str, stop_at_clip_layer: int) -> NodeResult:
    return NodeResult((clip,))


@node("ConditioningCombine")
def conditioning_combine(
    context: NodeContext, conditioning_1: str, conditioning_2: str
) -> NodeResult:
    return NodeResult((f"{conditioning_1}, {conditioning_2}",))


@node("ConditioningZeroOut")
def conditioning_zero_out(context: NodeContext, conditioning: str) -> NodeResult:
    return NodeResult(("",))


@node("FluxGuidance")
def flux_guidance(context: NodeContext, conditioning: str, guidance: float) -> NodeResult:
    return NodeResult((conditioning,))


@node("EmptyLatentImage")
@node("EmptySD3LatentImage")
def empty_latent_image(
    context: NodeContext, width: int, height: int, batch_size: int
) -> NodeResult:
    return NodeResult((Latent(width, height, batch_size),))


@node("LatentUpscale")
def latent_upscale(
    context: NodeContext, samples: Latent, upscale_method: str, width: int, height: int, crop: str
) -> NodeResult:
    if width == 0 and height == 0:
        return NodeResult((samples,))
    width = width or max(1, round(samples.width * height / samples.height))
    height = height or max(1, round(samples.height * width / samples.width))
    return NodeResult((_scaled(samples, upscale_method, width, height),))


@node("LatentUpscaleBy")
def latent_upscale_by(
    context: NodeContext, samples: Latent, upscale_method: str, scale_by: float
) -> NodeResult:
    width = max(1, round(samples.width * scale_by))
    height = max(1, round(samples.height * scale_by))
    return NodeResult((_scaled(samples, upscale_method, width, height),))


def _scaled(latent: Latent, method: str, width: int, height: int) -> Latent:
    # What was sampled before stays visible below what is sampled next.
    images = [resized(one, method, width, height, "disabled") for one in latent.decoded()]
    return Latent(width, height, latent.batch_size, source=images)


@node("KSampler")
def ksampler(
    context: NodeContext,
    seed: int,
    steps: int,
    positive: str,
    latent_image: Latent,
    denoise: float,
    **others: Any,
) -> NodeResult:
    return NodeResult((_sampled(context, latent_image, seed, positive, steps, denoise),))


@node("KSamplerAdvanced")
def ksampler_advanced(
    context: NodeContext,
    noise_seed: int,
    steps: int,
    positive: str,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    **others: Any,
) -> NodeResult:
    taken = max(0, min(end_at_step, steps) - start_at_step)
    strength = taken / steps
    return NodeResult((_sampled(context, latent_image, noise_seed, positive, taken, strength),))


@node("RandomNoise")
def random_noise(context: NodeContext, noise_seed: int) -> NodeResult:
    return NodeResult((noise_seed,))


@node("BasicScheduler")
def basic_scheduler(
    context: NodeContext, model: str, scheduler: str, steps: int, denoise: float
) -> NodeResult:
    return NodeResult(((steps, denoise),))


@node("KSamplerSelect")
def ksampler_select(context: NodeContext, sampler_name: str) -> NodeResult:
    return NodeResult((sampler_name,))


@node("CFGGuider")
def cfg_guider(
    context: NodeContext, model: str, positive: str, negative: str, cfg: float
) -> NodeResult:
    return NodeResult((positive,))


@node("BasicGuider")
def basic_guider(context: NodeContext, model: str, conditioning: str) -> NodeResult:
    return NodeResult((conditioning,))


@node("SamplerCustom")
def sampler_custom(
    context: NodeContext,
    noise_seed: int,
    positive: str,
    sigmas: tuple[int, float],
    latent_image: Latent,
    **others: Any,
) -> NodeResult:
    sampled = _sampled(context, latent_image, noise_seed, positive, *sigmas)
    return NodeResult((sampled, sampled))


@node("SamplerCustomAdvanced")
def sampler_custom_advanced(
    context: NodeContext,
    noise: int,
    guider: str,
    sigmas: tuple[int, float],
    latent_image: Latent,
    **others: Any,
) -> NodeResult:
    sampled = _sampled(context, latent_image, noise, guider, *sigmas)
    return NodeResult((sampled, sampled))


@node("VAEDecode")
@node("VAEDecodeTiled")
def vae_decode(context: NodeContext, samples: Latent, **others: Any) -> NodeResult:
    return NodeResult((samples.decoded(),))


@node("VAEEncode")
def vae_encode(context: NodeContext, pixels: Images, vae: str) -> NodeResult:
    width, height = pixels[0].size
    return NodeResult((Latent(width, height, len(pixels), source=pixels),))
