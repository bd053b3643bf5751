"""The models that `--model` knows. A preset describes a model completely: network, VAE, files and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from models.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parents[1] / "pretrained_models"


@dataclass(frozen=True)
class Preset:
    """A model.

    Args:
        architecture:    constructor fields of `MAR`, those that differ from its defaults at least.
        cfg:             CFG scale that it is evaluated with.
        checkpoint:      file of its weights.
        ema_expected:    the published scores are of EMA weights, and files of other weights circulate.
        vae:             constructor fields of the VAE that differ from its defaults.
        vae_class:       the VAE's network, with `encode` and `decode`.
        vae_path:        file of the VAE's weights.
        latent_scale:    the model's latents are the VAE's times this, which gives them unit variance.
        statistics_path: file of the real images' statistics, for FID.
        features:        the extractor that FID and IS are computed with, "inception" or "fashion".
    """

    architecture: Mapping[str, Any]
    cfg: float
    checkpoint: Path
    ema_expected: bool = True
    vae: Mapping[str, Any] = field(default_factory=dict)
    vae_class: type[nn.Module] = AutoencoderKL
    vae_path: Path = ROOT / "vae" / "kl16.ckpt"
    latent_scale: float = 0.2325
    statistics_path: Path = ROOT / "fid_stats" / "adm_in256_stats.npz"
    features: str = "inception"

    @property
    def class_num(self) -> int:
        """Number of classes."""
        return self.architecture["class_num"]


def _official(name: str, width: int, depth: int, heads: int, head_depth: int, head_width: int, cfg: float) -> Preset:
    """Describe a model of the MAR paper: encoder and decoder are equally wide and deep."""
    architecture = {
        "img_size": 256,
        "class_num": 1000,
        "encoder_embed_dim": width,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "diffloss_d": head_depth,
        "diffloss_w": head_width,
    }
    return Preset(architecture, cfg, checkpoint=ROOT / "mar" / name / "checkpoint-last.pth")


PRESETS = {
    "mar_base": _official("mar_base", 768, 12, 12, 6, 1024, cfg=2.9),
    "mar_large": _official("mar_large", 1024, 16, 16, 8, 1280, cfg=3.0),
    "mar_huge": _official("mar_huge", 1280, 20, 16, 12, 1536, cfg=3.25),
    # Fashion-MNIST in the paper's token geometry, trained by train.py and shipped.
    "mar_tiny": Preset(
        architecture={
            "img_size": 32,
            "class_num": 10,
            "vae_stride": 2,
            "vae_embed_dim": 2,
            "encoder_embed_dim": 128,
            "encoder_depth": 2,
            "encoder_num_heads": 2,
            "decoder_embed_dim": 128,
            "decoder_depth": 8,
            "decoder_num_heads": 2,
            "diffloss_d": 6,
            "diffloss_w": 224,
        },
        cfg=5.0,
        checkpoint=ROOT / "mar" / "mar_tiny" / "checkpoint-last.safetensors",
        ema_expected=False,
        vae={"embed_dim": 2, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1},
        vae_path=ROOT / "vae" / "mar_tiny.safetensors",
        statistics_path=ROOT / "fid_stats" / "fashion_classifier_stats.npz",
        features="fashion",
    ),
}
