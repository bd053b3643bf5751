"""The options of an evaluation: their flags, their defaults, and the check of what was asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models import MAR, METHODS, PRESETS, CachePolicy, Method, Preset, create_model
from models.lazymar.flops import Flops, flops_per_step
from models.lazymar.plan import CFG_SCHEDULES, Plan, make_plan
from models.lazymar.sampler import SAMPLER_VERSION
from util.cli import Parser, check_ranges, flag, numbers
from util.errors import InputError
from util.machine import DTYPES, ROOT, dtype_name
from util.runs.methods import add_method, in_a_path, record_settings, take_method
from util.scoring.scores import FID_AND_IS, Metrics, check_count


def labels_of_images(indices: Iterable[int], num_classes: int) -> list[int]:
    """The classes of a run's images, given their numbers: image i is of class i mod `num_classes`.

    So every class comes as often as any other, up to one, however far a run has come.
    """
    return [index % num_classes for index in indices]


@dataclass(frozen=True)
class Options:
    """The settings of an evaluation; the defaults are the paper's. `check` replaces each None that has a default."""

    model: str = flag("mar_huge", "model to sample from; it brings its network, weights and CFG scale", choices=PRESETS)
    num_images: int = flag(50_000, "images to generate; every class gets the same number, up to one", minimum=1)
    class_labels: tuple[int, ...] | None = flag(
        None, "generate one image of each of these classes instead, without scores, e.g. 207,360", metavar="CLASS,..."
    )
    eval_bsz: int = flag(128, "batch size: images that each process samples at a time", minimum=1)
    method: Method = METHODS["mar"]
    cfg: float | None = flag(
        None,
        "CFG (classifier-free guidance) scale: at least 1, which is no guidance",
        metavar="SCALE",
        default_text="the model's",
    )
    cfg_schedule: str = flag(
        "linear",
        "whether the CFG scale rises with the number of known tokens or is constant",
        choices=CFG_SCHEDULES,
    )
    temperature: float = flag(1.0, "scale of the noise that the diffusion head adds at each denoising step", minimum=0)
    seed: int = flag(0, "seed; with an image's number, it decides everything random about the image", minimum=0)
    more_seeds: tuple[int, ...] = ()  # of further runs with the same settings
    device: str = flag("auto", "where to compute; auto is a GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        "dtype of weights and activations; auto is bfloat16 on GPUs and on CPUs that compute in it, float32 on others",
        choices=("auto", *DTYPES),
    )
    cuda_graphs: bool = flag(True, "capture each step as a CUDA graph and replay it for later batches; GPUs alone")
    resume: Path | None = flag(
        None,
        "MAR's weights: a file, or a folder that holds checkpoint-last.pth",
        default_text="the model's, in pretrained_models",
    )
    vae_path: Path | None = flag(
        None, "the VAE's weights", metavar="FILE", default_text="the model's, in pretrained_models"
    )
    statistics: Path | None = flag(
        None,
        "mean and covariance of the real images that FID compares with (.npz), and features of a sample of them for "
        "--precision_recall and --kid, as score.py makes it",
        metavar="FILE",
        default_text="the model's, in pretrained_models",
    )
    inception_weights: Path | None = flag(
        None,
        "weights of torch-fidelity's Inception network",
        metavar="FILE",
        default_text="PyTorch's hub folder, downloaded if missing",
    )
    output_dir: Path | None = flag(
        None,
        "folder of this run; the same command continues a run that was cut off",
        metavar="FOLDER",
        default_text="output/ and a name made of the settings",
    )
    save_images: bool = flag(True, "write every image as a PNG; if off, only those of the image grid")
    score: bool = flag(True, "compute FID and Inception Score; if off, no statistics are needed")
    metrics: Metrics = FID_AND_IS  # besides FID and Inception Score
    overwrite: bool = flag(False, "delete the run that --output_dir holds, and start anew")

    @property
    def preset(self) -> Preset:
        return PRESETS[self.model]

    @property
    def meta_model(self) -> MAR:
        """The network on the meta device: its layers and their sizes, without weights."""
        return _on_meta(self.model)

    @property
    def sampling(self) -> dict:
        """The settings that decide how long sampling takes, under the names of `count_flops` and `Sampler`."""
        return {"method": self.method, "cfg": self.cfg, "cfg_schedule": self.cfg_schedule}

    @property
    def flops(self) -> list[Flops]:
        """The FLOPs of each step of sampling one image."""
        return _flops(self)

    @property
    def plan(self) -> Plan:
        """What each step computes. Raises ValueError, naming the setting, for one that is out of range."""
        return make_plan(
            self.meta_model.seq_len,
            self.meta_model.buffer_size,
            self.method,
            cfg=self.preset.cfg if self.cfg is None else self.cfg,
            cfg_schedule=self.cfg_schedule,
        )

    def labels(self) -> Sequence[int]:
        """The class of each image."""
        return self.class_labels or labels_of_images(range(self.num_images), self.meta_model.class_num)

    def settings(self, device: torch.device, dtype: torch.dtype) -> dict:
        """The settings that the images depend on, apart from the weights, as `run.json` holds them."""
        names = ["model", "num_images", "class_labels", "eval_bsz", "cfg", "cfg_schedule", "temperature", "seed"]
        return {
            **{name: getattr(self, name) for name in names},
            **record_settings(self.method),
            "device": device.type,
            "dtype": dtype_name(dtype),
            "sampler_version": SAMPLER_VERSION,
        }


@functools.lru_cache
def _on_meta(model: str) -> MAR:
    with torch.device("meta"):
        return create_model(model)


@functools.lru_cache
def _flops(options: Options) -> list[Flops]:
    return flops_per_step(options.meta_model, options.plan)


class CheckedOptions(Options):
    """Options that are in range and whose defaults have been filled in, as `check` returns them."""

    if TYPE_CHECKING:  # of the same fields, those that are not None any more
        cfg: float
        resume: Path
        vae_path: Path
        statistics: Path
        output_dir: Path


def check(options: Options) -> CheckedOptions:
    """Fill in the defaults of options. Raises InputError for a value out of range, naming its flag."""
    model, preset = options.meta_model, options.preset
    if options.class_labels is not None:
        if not options.class_labels or not all(0 <= label < model.class_num for label in options.class_labels):
            raise InputError(f"--class_labels must be classes of {options.model}, from 0 to {model.class_num - 1}")
        options = dataclasses.replace(options, num_images=len(options.class_labels), score=False)
    check_ranges(options)
    if options.metrics.flags and not options.score:
        without = "--no-score" if options.class_labels is None else "--class_labels"
        raise InputError(f"{options.metrics.flags[0]} has no use with {without}, which makes no scores: leave one out")
    check_count(options.metrics, options.num_images, "--num_images is", "make more images.")
    cfg = preset.cfg if options.cfg is None else options.cfg
    try:
        options.plan  # noqa: B018
    except ValueError as error:
        raise InputError(f"--{error}") from None
    check_blocks(options)
    if options.inception_weights and preset.features != "inception":
        raise InputError(f"--inception_weights is not for {options.model}, which a classifier of its own scores")

    images = str(options.num_images)
    if options.class_labels is not None:
        images = "classes-" + "-".join(map(str, options.class_labels[:8]))
    name = f"{options.model}{in_a_path(options.method)}-cfg{cfg:g}-{images}"
    filled_in = {
        "cfg": cfg,
        "resume": options.resume or ROOT / preset.checkpoint,
        "vae_path": options.vae_path or ROOT / preset.vae_path,
        "statistics": options.statistics or ROOT / preset.statistics_path,
        "output_dir": options.output_dir or Path("output", name),
    }
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    return CheckedOptions(**{**values, **filled_in})


def check_blocks(options: Options) -> None:
    """Raise InputError for a caching policy that names a block which the model does not have."""
    model, policy = options.meta_model, options.method.cache
    if policy is None:
        return
    if policy.token_cache and policy.prune_layer >= len(model.decoder_blocks):
        raise InputError(
            f"--prune_layer must be below {len(model.decoder_blocks)}, the decoder blocks of {options.model}"
        )
    # The default is for any head, and skips what there is.
    num_blocks, skipped = len(model.diffloss.net.res_blocks), policy.head_skipped_blocks
    if policy.head_cache and skipped != CachePolicy().head_skipped_blocks and max(skipped, default=0) >= num_blocks:
        raise InputError(
            f"--head_skipped_blocks must be below {num_blocks}, the residual blocks of the head of {options.model}"
        )


def parse_options(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Read the options from a command line.

    Raises InputError for unknown flags, for values that cannot be read, and for flags that make no method.
    """
    parser = Parser(description, usage="%(prog)s [flags]")
    names = [field.name for field in dataclasses.fields(Options) if "help" in field.metadata]
    before, after = names[: names.index("seed")], names[names.index("seed") + 1 :]
    parser.add_fields(Options, *before)
    parser.add(
        "--seed",
        numbers,
        "seed; with an image's number, it decides everything random about the image. Several make a run each, and mean "
        "and spread of their scores",
        default=(Options.seed,),
        minimum=0,
        metavar="SEED,...",
    )
    parser.add_fields(Options, *after)
    parser.add_fields(Metrics)
    add_method(parser)
    given = vars(parser.parse_args(arguments))
    seeds = given.pop("seed")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"--seed takes one seed or several different ones, not {','.join(map(str, seeds)) or 'none'}")
    given.update(seed=seeds[0], more_seeds=tuple(seeds[1:]))
    given["metrics"] = Metrics(**{field.name: given.pop(field.name) for field in dataclasses.fields(Metrics)})
    return Options(method=take_method(given), **given)
