"""The models that `eval.py --model` knows: their geometry, their files and the paper's guidance."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A model by name. `architecture` and `vae` are constructor fields of `MAR` and `AutoencoderKL`.

    `cfg` is the guidance it is evaluated with; `features` names the extractor that its FID and IS are measured with.
    """

    architecture: dict
    cfg: float
    checkpoint: str
    vae_path: str = "pretrained_models/vae/kl16.ckpt"
    vae: dict = field(default_factory=dict)
    statistics_path: str = "pretrained_models/fid_stats/adm_in256_stats.npz"
    features: str = "inception"


def _official(name: str, width: int, depth: int, heads: int, head_depth: int, head_width: int, cfg: float) -> Preset:
    """A model of the MAR paper: encoder and decoder are equally wide and deep."""
    return Preset(
        architecture={
            "encoder_embed_dim": width,
            "encoder_depth": depth,
            "encoder_num_heads": heads,
            "decoder_embed_dim": width,
            "decoder_depth": depth,
            "decoder_num_heads": heads,
            "diffloss_d": head_depth,
            "diffloss_w": head_width,
        },
        cfg=cfg,
        checkpoint=f"pretrained_models/mar/{name}/checkpoint-last.pth",
    )


PRESETS = {
    "mar_base": _official("mar_base", 768, 12, 12, 6, 1024, cfg=2.9),
    "mar_large": _official("mar_large", 1024, 16, 16, 8, 1280, cfg=3.0),
    "mar_huge": _official("mar_huge", 1280, 20, 16, 12, 1536, cfg=3.25),
    # Fashion-MNIST in the paper's token geometry, trained by train.py and shipped.
    "mar_tiny": Preset(
        architecture={
            "img_size": 32,
            "vae_stride": 2,
            "vae_embed_dim": 2,
            "encoder_embed_dim": 128,
            "encoder_depth": 2,
            "encoder_num_heads": 2,
            "decoder_embed_dim": 128,
            "decoder_depth": 8,
            "decoder_num_heads": 2,
            "class_num": 10,
            "diffloss_d": 6,
            "diffloss_w": 224,
        },
        cfg=5.0,
        checkpoint="pretrained_models/mar/mar_tiny/checkpoint-last.safetensors",
        vae_path="pretrained_models/vae/mar_tiny.safetensors",
        vae={"embed_dim": 2, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1},
        statistics_path="pretrained_models/fid_stats/fashion_classifier_stats.npz",
        features="fashion",
    ),
}
