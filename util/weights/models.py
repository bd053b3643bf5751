"""Models that are ready for sampling, by name: with the weights that the presets say, or with random ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from models import MAR, PRESETS, AutoencoderKL, cast_model, create_model, pack_linear_layers
from models.vae import for_inference
from util.machine import ROOT, choose_device, choose_dtype
from util.weights.checkpoint import LoadedWeights, load_weights


def load_model(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    weights: str | os.PathLike | None = None,
    vae_weights: str | os.PathLike | None = None,
) -> tuple[MAR, AutoencoderKL]:
    """Load a model and its VAE, ready for sampling and decoding.

    Args:
        name:        a key of `models.PRESETS`, such as "mar_huge".
        device:      where to. Default: a GPU where there is one, else the CPU.
        dtype:       of weights and activations. Default: bfloat16 on GPUs and on CPUs that compute in it, else float32.
        weights:     file of the model's weights. Default: the preset's, in this repository's `pretrained_models/`.
        vae_weights: file of the VAE's weights. Default: likewise.

    Raises:
        ValueError: there is no such model.
        InputError: a file is missing or damaged, or its weights are another network's.
    """
    with torch.device("meta"):
        model = create_model(name)
        vae = AutoencoderKL(**PRESETS[name].vae)
    device = choose_device("auto") if device is None else torch.device(device)
    dtype = choose_dtype("auto", device) if dtype is None else dtype
    path, vae_path = weights or ROOT / PRESETS[name].checkpoint, vae_weights or ROOT / PRESETS[name].vae_path
    loaded = load_weights(model, path, what=name, device=device, identify=identify_model)
    note_missing_ema(name, loaded)
    load_weights(vae, vae_path, what="the VAE", device=device, ignore_prefixes=["loss."])
    return _ready(model, vae, dtype)


def note_missing_ema(name: str, loaded: LoadedWeights) -> None:
    """Print a note, once for all processes, if nothing says that an official model's weights are averaged (EMA).

    The official checkpoints hold both. Files that others have made of them hold one, which need not be the average.
    """
    is_official = PRESETS[name].checkpoint.endswith(".pth")
    if is_official and not loaded.is_marked_as_ema and os.environ.get("RANK", "0") == "0":
        print(
            f"note: nothing says that {loaded.path} holds EMA weights, which the published scores are of; other "
            "weights score much worse, and the official checkpoints hold both",
            flush=True,
        )


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[MAR, AutoencoderKL]:
    """Make a model and its VAE with random weights, as ready as loaded ones: speed does not depend on the weights."""
    return _ready(create_model(name).to(device), AutoencoderKL(**PRESETS[name].vae).to(device), dtype)


def _ready(model: MAR, vae: AutoencoderKL, dtype: torch.dtype) -> tuple[MAR, AutoencoderKL]:
    pack_linear_layers(cast_model(model, dtype))
    return model, for_inference(vae, dtype)


def identify_model(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Name the preset that weights of these shapes are for, by the width of the class embedding; None if none is."""
    width = shapes.get("class_emb.weight", [0])[-1]
    widths = {name: preset.architecture.get("encoder_embed_dim") for name, preset in PRESETS.items()}
    return next((name for name, of_preset in widths.items() if of_preset == width), None)
