"""The models that `--model` knows. A preset describes a model completely: network, VAE, files and guidance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from models.vae import AutoencoderKL, deep_compression_autoencoder

ROOT = Path(__file__).resolve().parents[1] / "pretrained_models"


@dataclass(frozen=True)
class Preset:
    """A model.

    Args:
        architecture:    constructor fields of `MAR`, those that differ from its defaults at least.
        cfg:             CFG scale that it is evaluated with.
        cfg_schedule:    its CFG schedule, one of `models.lazymar.schedule.CFG_SCHEDULES`.
        checkpoint:      file of its weights.
        ema_expected:    the published scores are of EMA weights, and files of other weights circulate.
        make_vae:        makes the VAE's network, with `encode` and `decode`; raises ValueError, naming model, if it
                         needs a package that is not installed.
        vae_path:        file of the VAE's weights.
        latent_scale:    the model's latents are the VAE's times this, which gives them about unit variance.
        statistics_path: file of the real images' statistics, for FID.
        features:        the extractor that FID and IS are computed with, "inception" or "fashion".
    """

    architecture: Mapping[str, Any]
    cfg: float
    checkpoint: Path
    cfg_schedule: str = "linear"
    ema_expected: bool = True
    make_vae: Callable[[], Any] = AutoencoderKL
    vae_path: Path = ROOT / "vae" / "kl16.ckpt"
    latent_scale: float = 0.2325
    statistics_path: Path = ROOT / "fid_stats" / "adm_in256_stats.npz"
    features: str = "inception"


def architecture(width: int, depth: int, heads: int, head_depth: int, head_width: int, **fields: Any) -> dict:
    """Return the fields of a model whose encoder and decoder are equally wide and deep, unless `fields` differ."""
    return {
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
        **fields,
    }


def _mar(name: str, *sizes: int, cfg: float) -> Preset:
    """Describe a model of the MAR paper."""
    return Preset(architecture(*sizes), cfg, checkpoint=ROOT / "mar" / name / "checkpoint-last.pth")


def _emigm(size: str, *sizes: int) -> Preset:
    """Describe a model of 256 pixels of eMIGM (arXiv 2503.07197; sizes and settings are from its code)."""
    return Preset(
        architecture(*sizes, one_fake_token=True),
        cfg=4.0,
        cfg_schedule="constant",
        checkpoint=ROOT / "emigm" / "256_model" / f"eMIGM_{size}_256_checkpoint.pth",
    )


def _emigm_512(size: str, *sizes: int) -> Preset:
    """Describe a model of 512 pixels of eMIGM: as many tokens as at 256 pixels, by an autoencoder of stride 32."""
    return replace(
        _emigm(size, *sizes),
        architecture=architecture(*sizes, one_fake_token=True, img_size=512, vae_stride=32, vae_embed_dim=32),
        checkpoint=ROOT / "emigm" / "512_model" / f"eMIGM_{size}_512_checkpoint.pth",
        make_vae=deep_compression_autoencoder,
        vae_path=ROOT / "vae" / "dc_ae" / "diffusion_pytorch_model.safetensors",
        latent_scale=0.3189,
        statistics_path=ROOT / "fid_stats" / "fid_stats_imagenet512_guided_diffusion.npz",
    )


PRESETS = {
    # width, blocks and heads of encoder and decoder each; blocks and width of the head
    "mar_base": _mar("mar_base", 768, 12, 12, 6, 1024, cfg=2.9),
    "mar_large": _mar("mar_large", 1024, 16, 16, 8, 1280, cfg=3.0),
    "mar_huge": _mar("mar_huge", 1280, 20, 16, 12, 1536, cfg=3.25),
    "emigm_xsmall": _emigm("xsmall", 448, 10, 8, 3, 1024),
    "emigm_small": _emigm("small", 512, 12, 8, 3, 1024),
    "emigm_base": _emigm("base", 768, 12, 12, 6, 1024),
    "emigm_large": _emigm("large", 1024, 16, 16, 8, 1280),
    "emigm_huge": _emigm("huge", 1280, 20, 16, 12, 1536),
    "emigm_xsmall_512": _emigm_512("xsmall", 448, 10, 8, 6, 1280),
    "emigm_small_512": _emigm_512("small", 512, 12, 8, 6, 1280),
    "emigm_base_512": _emigm_512("base", 768, 12, 12, 8, 1280),
    "emigm_large_512": _emigm_512("large", 1024, 16, 16, 8, 1280),
    # Fashion-MNIST in the paper's token geometry, trained by train.py and shipped.
    "mar_tiny": Preset(
        architecture(128, 2, 2, 6, 224, decoder_depth=8, img_size=32, class_num=10, vae_stride=2, vae_embed_dim=2),
        cfg=5.0,
        checkpoint=ROOT / "mar" / "mar_tiny" / "checkpoint-last.safetensors",
        ema_expected=False,
        make_vae=partial(AutoencoderKL, embed_dim=2, ch=32, ch_mult=(1, 2), num_res_blocks=1),
        vae_path=ROOT / "vae" / "mar_tiny.safetensors",
        statistics_path=ROOT / "fid_stats" / "fashion_classifier_stats.npz",
        features="fashion",
    ),
}

# The models of the MAR paper, and ours: what is trained and reproduced here.
MAR_MODELS = tuple(name for name in PRESETS if name.startswith("mar_"))
