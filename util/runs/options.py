"""What `eval.py` can be asked for: the options, their flags, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models import MAR, PRESETS, CachePolicy, Preset, create_model
from models.lazymar.flops import Flops, flops_per_step
from models.lazymar.plan import CFG_SCHEDULES, make_plan
from models.lazymar.sampler import SAMPLER_VERSION
from util.cli import Parser, add_policy_flags, numbers, read_policy
from util.errors import InputError
from util.machine import DTYPES, ROOT, dtype_name


@dataclass(frozen=True)
class Options:
    """What to generate and how; the defaults are the paper's. `check` replaces each None that has a default."""

    model: str = "mar_huge"
    num_images: int = 50_000
    class_labels: tuple[int, ...] | None = None  # one image of each instead of `num_images` of all classes, no scores
    eval_bsz: int = 128
    num_iter: int = 64
    cfg: float | None = None
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    num_sampling_steps: int = 100
    seed: int = 0
    cache: CachePolicy | None = None  # None: the baseline
    device: str = "auto"
    dtype: str = "auto"
    cuda_graphs: bool = True
    resume: Path | None = None  # MAR's weights
    vae_path: Path | None = None
    statistics: Path | None = None
    inception_weights: Path | None = None
    output_dir: Path | None = None
    save_images: bool = True  # False: those of the contact sheet alone
    score: bool = True
    overwrite: bool = False

    @property
    def preset(self) -> Preset:
        return PRESETS[self.model]

    @property
    def shape(self) -> MAR:
        """The network on the meta device: everything but the weights."""
        return _on_meta(self.model)

    @property
    def sampling(self) -> dict:
        """What decides how long sampling takes, as `flops_per_step` and `Sampler` name it."""
        return {name: getattr(self, name) for name in ("num_iter", "cfg", "num_sampling_steps", "cache")}

    @property
    def flops(self) -> list[Flops]:
        """What each step of sampling one image takes."""
        return _flops(self)

    def labels(self) -> Sequence[int]:
        """The class of each image. Every class comes as often as any other, up to one, however far a run has come."""
        return self.class_labels or [index % self.shape.class_num for index in range(self.num_images)]

    def settings(self, device: torch.device, dtype: torch.dtype) -> dict:
        """What the images depend on, apart from the weights."""
        names = ["model", "num_images", "class_labels", "eval_bsz", "num_iter", "cfg", "cfg_schedule", "temperature"]
        return {
            **{name: getattr(self, name) for name in [*names, "num_sampling_steps", "seed"]},
            "device": device.type,
            "dtype": dtype_name(dtype),
            "lazy_mar": self.cache is not None,
            "cache": dataclasses.asdict(self.cache) if self.cache else {},
            "sampler_version": SAMPLER_VERSION,
        }


@functools.lru_cache
def _on_meta(model: str) -> MAR:
    with torch.device("meta"):
        return create_model(model)


@functools.lru_cache
def _flops(options: Options) -> list[Flops]:
    return flops_per_step(options.shape, **options.sampling)


def check(options: Options) -> Options:
    """The options with their defaults filled in.

    Raises InputError for a value out of range, naming its flag.
    """
    model, preset = options.shape, options.preset
    if options.class_labels is not None:
        if not options.class_labels or not all(0 <= label < model.class_num for label in options.class_labels):
            raise InputError(f"--class_labels must be classes of {options.model}, from 0 to {model.class_num - 1}")
        options = dataclasses.replace(options, num_images=len(options.class_labels), score=False)
    ranges = {"num_images": (1, math.inf), "eval_bsz": (1, math.inf), "num_sampling_steps": (2, 1000)}
    for name, (least, most) in {**ranges, "seed": (0, math.inf)}.items():
        if not least <= getattr(options, name) <= most:
            allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise InputError(f"--{name} must be {allowed}, not {getattr(options, name)}")
    if not 0 <= options.temperature < math.inf:
        raise InputError(f"--temperature must be a finite number of at least 0, not {options.temperature}")
    cfg = preset.cfg if options.cfg is None else options.cfg
    try:
        make_plan(
            model.seq_len,
            model.buffer_size,
            num_iter=options.num_iter,
            cfg=cfg,
            cfg_schedule=options.cfg_schedule,
            num_sampling_steps=options.num_sampling_steps,
            policy=options.cache,
        )
    except ValueError as error:
        raise InputError(f"--{error}") from None
    if options.cache is not None and options.cache.prune_layer >= len(model.decoder_blocks):
        raise InputError(
            f"--prune_layer must be below {len(model.decoder_blocks)}, the decoder blocks of {options.model}"
        )
    if options.inception_weights and preset.features != "inception":
        raise InputError(f"--inception_weights is not for {options.model}, which a classifier of its own scores")

    images = options.num_images
    if options.class_labels is not None:
        images = "classes-" + "-".join(map(str, options.class_labels[:8]))
    name = f"{options.model}{'-lazy' * bool(options.cache)}-iter{options.num_iter}-cfg{cfg:g}-{images}"
    return dataclasses.replace(
        options,
        cfg=cfg,
        resume=options.resume or ROOT / preset.checkpoint,
        vae_path=options.vae_path or ROOT / preset.vae_path,
        statistics=options.statistics or ROOT / preset.statistics_path,
        output_dir=options.output_dir or Path("output", name),
    )


def parse_options(description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line.

    Raises InputError for flags that are unknown, or whose values cannot be read.
    """
    parser = Parser(description)
    add, default = parser.add_argument, Options
    add("--model", default=default.model, choices=PRESETS)
    add("--num_images", type=int, default=default.num_images, help="the same number of each class, up to one")
    add("--class_labels", type=numbers, help="make one image of each of these classes instead, e.g. 207,360")
    add("--eval_bsz", type=int, default=default.eval_bsz, help="images that a process samples together")
    add("--num_iter", type=int, default=default.num_iter, help="autoregressive steps, at most the number of tokens")
    add("--cfg", type=float, help="guidance scale; 1: none (default: the model's)")
    add("--cfg_schedule", default=default.cfg_schedule, choices=CFG_SCHEDULES)
    add("--temperature", type=float, default=default.temperature, help="scales the noise of the diffusion head")
    add("--num_sampling_steps", type=int, default=default.num_sampling_steps, help="denoising steps of the head")
    add("--seed", type=int, default=default.seed, help="with an image's number, decides all that is random about it")
    add("--device", default=default.device, choices=("auto", "cpu", "cuda"))
    add("--dtype", default=default.dtype, choices=("auto", *DTYPES))
    parser.add_switch("cuda_graphs", default.cuda_graphs, "on a GPU, record each step once and replay it")
    add("--resume", type=Path, help="the model's weights: a file, or a folder with checkpoint-last.pth")
    add("--vae_path", type=Path, help="the VAE's weights")
    add("--statistics", type=Path, help="mu and sigma of the images that FID compares with (.npz)")
    add("--inception_weights", type=Path, help="torch-fidelity's file, where it cannot be downloaded")
    add("--output_dir", type=Path, help="of this run (default: output/ and a name made of the settings)")
    add("--overwrite", action="store_true", help="delete the run that --output_dir holds")
    parser.add_switch("save_images", default.save_images, "write PNGs; --no-save_images: only the contact sheet's")
    parser.add_switch("score", default.score, "compute FID and Inception Score; --no-score needs no statistics")
    add_policy_flags(parser)
    given = vars(parser.parse_args(arguments))
    names = [field.name for field in dataclasses.fields(Options) if field.name != "cache"]
    return Options(cache=read_policy(given), **{name: given[name] for name in names})
