"""`MARPipeline`: from class labels to images, and inpainting, after the conventions of Hugging Face's diffusers."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models import MAR, PRESETS, AutoencoderKL, Method, Plan, Preset, Sampler
from models.lazymar.flops import Flops, plan_flops
from models.lazymar.plan import Step
from models.lazymar.sampler import SampledStep
from models.methods import with_settings
from util.errors import InputError
from util.images import decode, encode, to_pixels
from util.machine import retry_eagerly
from util.weights import load_model

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PipelineOutput(NamedTuple):
    """What a call of the pipeline returns. Its `images` are of the `output_type`:

    "pil" a list of PIL images, "np" an array [B, H, W, 3] and "pt" a tensor [B, 3, H, W], both of floats from 0 to 1;
    "latent" latents [B, C, h, w] at unit variance.
    """

    images: Any
    plan: Plan  # what was computed at each step
    flops: Flops  # of sampling one image, without the VAE
    seconds: float  # of the whole batch, with the VAE


Callback = Callable[["MARPipeline", int, Step, Mapping[str, Tensor]], object]


class MARPipeline:
    """A model and its VAE, ready to make images. The sampler of the last call is kept, so that the same call is warm.

    `plan` is that of the last call, or of the call that is going on.
    """

    def __init__(self, model: MAR, vae: AutoencoderKL, preset: Preset) -> None:
        self.model, self.vae, self.preset = model, vae, preset
        self.plan: Plan | None = None
        # Makes the sampler of a plan and of keyword arguments of `Sampler`, and keeps the last one.
        self.sampler: Callable[..., Sampler] = lru_cache(maxsize=1)(partial(Sampler, model))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        preset: str | None = None,
        vae_path: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> "MARPipeline":
        """Load a preset's weights; or those of a file, or of a folder with `checkpoint-last.pth`, that fit a preset.

        Args:
            name_or_path: a key of `PRESETS`, or a path if `preset` is given.
            preset:       a key of `PRESETS`, whose network the weights are of.
            vae_path:     file of the VAE's weights; default: the preset's.
            device:       default: a GPU where there is one, else the CPU.
            dtype:        default: bfloat16 on devices that compute in it, else float32.
            overrides:    constructor fields of `MAR` that replace the preset's, such as `class_num`.

        Raises ValueError for an unknown preset, and for weights that are missing, damaged or another network's.
        """
        name = str(name_or_path) if preset is None else preset
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}; a path needs preset= too")
        paths = {"weights": None if preset is None else name_or_path, "vae_weights": vae_path}
        try:
            return cls(*load_model(name, device, dtype, **paths, **overrides), PRESETS[name])
        except InputError as error:
            raise ValueError(str(error)) from error

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, 3, H, W] float32, of about [-1, 1], of latents [B, C, h, w] at unit variance."""
        return decode(self.vae, latents / self.preset.latent_scale)

    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, C, h, w] at unit variance, the posterior's mean, of images [B, 3, H, W] in [-1, 1]."""
        return encode(self.vae, images.to(self.model.mask_token.device)) * self.preset.latent_scale

    def __call__(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        image: Any = None,
        mask_image: Any = None,
        method: Method | str = "mar",
        cfg: float | None = None,
        cfg_schedule: str | None = None,
        seed: int = 0,
        image_numbers: Sequence[int] | None = None,
        num_images_per_label: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> PipelineOutput:
        """Make a batch of images of the given classes; with an image and a mask, repaint the masked part of the image.

        The same seed, settings and image numbers give the images of `eval.py`.

        Args:
            labels:               class numbers.
            image:                to inpaint: a PIL image, an array [H, W, 3] or a tensor [3, H, W] for all labels; or a
                                  list of one for each label. Integers are from 0 to 255, floats from 0 to 1.
            mask_image:           one mask for all images: a PIL image, an array or a tensor [H, W]. White is repainted;
                                  every other pixel keeps the image's value.
            method:               a `Method` or its name, such as "lazymar" or "fast".
            cfg:                  scale of classifier-free guidance; default: the preset's.
            cfg_schedule:         "linear" or "constant"; default: the preset's.
            seed:                 of all random numbers.
            image_numbers:        [B] numbers of the images in the run, each with noise of its own; default: 0 to B - 1.
            num_images_per_label: images of each label; they follow one another.
            output_type:          "pil", "np", "pt" or "latent"; see `PipelineOutput`.
            callback_on_step_end: is called as f(pipe, index, step, tensors) after each step, with the step's plan and
                                  `tensors["latents"]` [B, C, h, w], which are zero at unknown tokens, and
                                  `tensors["known"]`, a BoolTensor [B, L]. An exception that it raises ends the call.
            progress:             show a progress bar.
            settings:             fields of `Method` that replace the method's, such as `temperature=0.9`.

        Raises ValueError, naming the argument, for one that is out of range.
        """
        start = time.perf_counter()
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
        class_labels = torch.as_tensor(labels).reshape(-1).cpu().repeat_interleave(max(0, num_images_per_label))
        numbers = range(len(class_labels)) if image_numbers is None else image_numbers
        if not 0 < len(class_labels) == len(numbers):
            raise ValueError("labels, num_images_per_label and image_numbers must make equally many images")
        if (image is None) != (mask_image is None):
            raise ValueError("image and mask_image must be given together")
        known = latents = None
        if image is not None:
            original = self._read_images(image, len(class_labels), num_images_per_label)
            repainted, known = self._read_mask(mask_image)
            latents = self.encode(original)
        cfg = self.preset.cfg if cfg is None else cfg
        cfg_schedule = self.preset.cfg_schedule if cfg_schedule is None else cfg_schedule
        method = with_settings(self.model, method, settings)
        self.plan = plan = method.plan(self.model, cfg=cfg, cfg_schedule=cfg_schedule, known=known)
        sampler = self.sampler(plan)
        with tqdm(total=len(plan), disable=not progress, unit="step") as bar:
            follow = self._follow(bar, callback_on_step_end, len(class_labels), latents, known)
            noise = sampler.noise(seed, numbers)
            images = retry_eagerly(sampler, sampler, class_labels, noise, follow, latents)
        if not images.isfinite().all():
            raise ValueError("the latents are not finite: try dtype=torch.float32, or other weights")
        if output_type != "latent":
            images = retry_eagerly(sampler, self.decode, images)
            if known is not None:
                images = torch.where(repainted.to(images.device), images, original.to(images.device))
            images = as_type(images, output_type)
        flops = plan_flops(self.model, plan)
        return PipelineOutput(images, plan, flops, time.perf_counter() - start)

    def _follow(
        self, bar: tqdm, callback: Callback | None, num_images: int, latents: Tensor | None, known: Tensor | None
    ) -> Callable[[SampledStep], None]:
        """Return a function that counts each step, and calls the callback with what is known after it."""
        model, device = self.model, self.model.mask_token.device
        tokens = torch.zeros(num_images, model.seq_len, model.token_dim, device=device)
        is_known = torch.zeros(num_images, model.seq_len, dtype=torch.bool, device=device)
        if latents is not None and known is not None:
            is_known |= known.to(device)
            tokens += model.patchify(latents) * is_known[..., None]

        known_before, tokens_before = is_known.clone(), tokens.clone()

        def on_step(sampled: SampledStep) -> None:
            if sampled.step.index == 0:  # perhaps again: a batch that fails with CUDA graphs is sampled once more
                bar.reset()
                is_known.copy_(known_before)
                tokens.copy_(tokens_before)
            bar.update()
            if callback is not None:
                is_known.scatter_(1, sampled.positions, True)
                positions = sampled.positions[..., None].expand_as(sampled.tokens)
                tokens.scatter_(1, positions, sampled.tokens.to(tokens.dtype))
                tensors = {"latents": model.unpatchify(tokens), "known": is_known.clone()}
                callback(self, sampled.step.index, sampled.step, tensors)

        return on_step

    def _read_images(self, image: Any, batch_size: int, repeats: int) -> Tensor:
        """Return the images to inpaint [B, 3, H, W], in [-1, 1], with `repeats` images of each label."""
        num_labels = batch_size // repeats
        several = image if isinstance(image, (list, tuple)) else [image] * num_labels
        if len(several) != num_labels:
            raise ValueError(f"image must be one for all labels, or a list of one for each, not of {len(several)}")
        images = torch.stack([read_pixels(each, "image", self.model.img_size) for each in several])
        return 2 * images.repeat_interleave(repeats, dim=0) - 1

    def _read_mask(self, mask_image: Any) -> tuple[Tensor, Tensor]:
        """Return the masks of the pixels that are repainted [H, W] and of the tokens that are known [L]."""
        white = read_pixels(mask_image, "mask_image", self.model.img_size) >= 0.5
        touched = F.max_pool2d(white[None].float(), self.model.img_size // self.model.grid_size).flatten() > 0
        if touched.all() or not touched.any():
            raise ValueError("mask_image must be white where the image is repainted, and leave some tokens out")
        return white, ~touched


def read_pixels(image: Any, name: str, size: int) -> Tensor:
    """Return an "image" [3, H, W], or a "mask_image" [H, W], as float32 from 0 to 1.

    It is given as a PIL image, as an array whose channels come last, or as a tensor whose channels come first.
    """
    is_tensor, shape = isinstance(image, Tensor), (3, size, size) if name == "image" else (size, size)
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB" if name == "image" else "L"))
    values = image.cpu() if is_tensor else torch.from_numpy(np.array(image))
    if name == "image" and not is_tensor:
        values = values.movedim(-1, 0)
    if not values.is_floating_point() and values.dtype != torch.bool:
        values = values / 255
    if values.shape != shape or not (values.min() >= 0 and values.max() <= 1):
        numbers = "integers from 0 to 255, or floats from 0 to 1"
        raise ValueError(f"{name} must be {size} x {size} pixels, the model's image size, of {numbers}")
    return values.float()


def as_type(images: Tensor, output_type: str) -> Any:
    """Return images [B, 3, H, W] of about [-1, 1] as `output_type` "pil", "np" or "pt"; see `PipelineOutput`."""
    if output_type == "pil":
        return [Image.fromarray(pixels) for pixels in to_pixels(images)]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
