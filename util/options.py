"""The flags of `eval.py`: each is read, checked and completed before any work."""

import argparse
import functools
import json
import os
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

import models
from diffusion.solver import SolverSteps
from models import MAR, METHODS, PRESETS, AnnealedSteps, CachePolicy, DetailedTokens, Method, Plan, Preset, find_method
from models.lazymar.flops import Flops, plan_flops
from models.lazymar.sampler import SAMPLER_VERSION
from models.lazymar.schedule import CFG_SCHEDULES
from models.lazymar.selection import RULES
from models.methods import TOKEN_SCHEDULES
from util.cli import Parser, number, numbers
from util.errors import InputError
from util.folder import labels_of
from util.machine import DTYPES, dtype_name
from util.metrics import add_metric_flags, metrics_from_flags

# Settings that the images depend on, besides those of the method.
SETTINGS = ("model", "class_num", "num_images", "class_labels", "cfg", "cfg_schedule", "seed")


@dataclass(frozen=True)
class Options:
    """The complete settings of an evaluation, as `parse_options` makes them; a field is the flag of the same name."""

    model: str
    class_num: int
    num_images: int
    class_labels: tuple[int, ...] | None
    eval_bsz: int
    method_name: str  # as it was asked for, without the flags that replace its settings
    method: Method
    cfg: float
    cfg_schedule: str
    seed: int
    device: str
    dtype: str
    cuda_graphs: bool
    resume: Path
    vae_path: Path
    statistics: Path
    inception_weights: Path | None
    output_dir: Path
    save_images: bool
    score: bool
    metrics: tuple[str, ...]  # besides FID and Inception Score
    standard_errors: bool
    overwrite: bool
    sweep: tuple["Options", ...] = ()  # the runs of several seeds or CFG scales; empty for a single run

    @property
    def preset(self) -> Preset:
        return PRESETS[self.model]

    @property
    def meta_model(self) -> MAR:
        """The network on the meta device: its layers and their sizes, without weights."""
        return _on_meta(self.model, self.class_num)

    @functools.cached_property
    def plan(self) -> Plan:
        """What each step computes."""
        return self.method.plan(self.meta_model, cfg=self.cfg, cfg_schedule=self.cfg_schedule)

    @functools.cached_property
    def flops(self) -> Flops:
        """The FLOPs of sampling one image."""
        return plan_flops(self.meta_model, self.plan)

    def labels(self) -> list[int]:
        """The class of each image."""
        return labels_of(vars(self))

    def settings(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What the images depend on besides the weights, as `run.json` holds it."""
        own = {name: getattr(self, name) for name in SETTINGS}
        more = {"device": device.type, "dtype": dtype_name(dtype), "sampler_version": SAMPLER_VERSION}
        return json.loads(json.dumps({**own, **method_settings(self.method), **more}, default=str))


@functools.lru_cache
def _on_meta(model: str, class_num: int) -> MAR:
    with torch.device("meta"):
        PRESETS[model].make_vae()  # raises ValueError if it needs a package that is missing
        return models.create_model(model, class_num=class_num)


def parse_options(argv: Sequence[str] | None = None, description: str | None = None) -> Options:
    """Read a command line, fill in the defaults, and check what can be checked without files.

    Raises InputError, naming the flag.
    """
    args = _parser(description).parse_args(argv)
    preset = PRESETS[args.model]
    defaults = {
        "class_num": preset.architecture["class_num"],
        "num_images": len(args.class_labels or ()) or 50_000,
        "cfg": (preset.cfg,),
        "cfg_schedule": preset.cfg_schedule,
        "resume": preset.checkpoint,
        "vae_path": preset.vae_path,
        "statistics": preset.statistics_path,
    }
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.metrics = metrics_from_flags(args)
    name = args.method or ("lazymar" if args.lazy_mar else "mar")
    args.method_name = "+".join(part.strip().lower() for part in name.split("+"))
    args.method = _method_of(args)
    _check(args)
    args.score = args.score and args.class_labels is None

    seeds, scales = args.seed, args.cfg
    given = {field.name: getattr(args, field.name) for field in fields(Options) if field.name != "sweep"}
    runs = [Options(**{**given, "seed": seed, "cfg": cfg}) for cfg in scales for seed in seeds]
    for run in runs:
        _check_method(run)
    folder = args.output_dir or Path("output", _folder_name(args, len(runs[0].plan)))
    options = replace(runs[0], output_dir=folder)
    if len(runs) == 1:
        return options
    # Each in a folder of its own, such as seed-0 or cfg-2.5 or cfg-2.5-seed-0.
    parts = ["cfg-{0.cfg:.15g}"] * (len(scales) > 1) + ["seed-{0.seed}"] * (len(seeds) > 1)
    sweep = (replace(run, output_dir=folder / "-".join(parts).format(run)) for run in runs)
    return replace(options, sweep=tuple(sweep))


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that do not go with each other."""
    labels = args.class_labels
    if labels is not None and not (labels and max(labels) < args.class_num):
        raise InputError(f"--class_labels must be classes of {args.model}, from 0 to {args.class_num - 1}")
    for flag in ("seed", "cfg"):
        values = getattr(args, flag)
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{flag} takes one value, or several different ones with commas between them")
    if args.overwrite and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise InputError("--overwrite would delete the images at each restart by torchrun: leave --max_restarts out")
    scores = [*args.metrics, *["standard_errors"] * args.standard_errors]
    if scores and (labels or not args.score):
        raise InputError(f"--{scores[0]} has no use with --no-score or --class_labels, which make no scores")


def _folder_name(args: argparse.Namespace, num_iter: int) -> str:
    """The default name of a run's folder, such as mar_huge-lazy-iter64-cfg3.25-50000."""
    method = {"mar": "", "lazymar": "-lazy"}.get(args.method_name, f"-{args.method_name}").replace("+", "-")
    cfg = "-".join(f"{scale:.15g}" for scale in args.cfg)
    labels = "".join(f"-{label}" for label in (args.class_labels or ())[:8])
    name = f"{args.model}{method}-iter{num_iter}-cfg{cfg}-{args.num_images}"
    return name + f"-classes{labels}" * bool(labels) + "-seeds" * (len(args.seed) > 1)


def _check_method(options: Options) -> None:
    """Raise InputError, naming the flag, for a method that does not fit the model, and for a missing package."""
    try:
        policy = options.plan.policy
    except ValueError as error:
        raise InputError(f"--{error}") from None
    blocks = len(options.meta_model.decoder_blocks)
    if policy.token_cache and policy.prune_layer >= blocks:
        raise InputError(f"--prune_layer must be below {blocks}, the decoder blocks of {options.model}")


# fmt: off
def _parser(description: str | None) -> Parser:
    parser = Parser(description, usage="%(prog)s [flags]")
    add = parser.add_argument
    switch = functools.partial(add, action=BooleanOptionalAction, default=True)
    add("--model", choices=PRESETS, default="mar_huge", help="it brings its network, weights and CFG scale")
    add("--num_images", type=number(int, 1, 10_000_000), metavar="N", help="images to generate (default: 50000)")
    add("--class_labels", type=numbers(int, 0), metavar="CLASS,...",
        help="generate these classes in turn, without scores (default of --num_images: one image of each)")
    add("--class_num", type=number(int, 1, 1_000_000), metavar="N",
        help="classes of fine-tuned weights (default: the model's)")
    add("--eval_bsz", type=number(int, 1), default=128, metavar="N", help="batch size: images sampled together")
    add("--cfg", type=numbers(float, 1), metavar="SCALE,...",
        help="scale of classifier-free guidance, 1 is none; several make a run each (default: the model's)")
    add("--cfg_schedule", choices=CFG_SCHEDULES, help="growing with the known tokens, or not (default: the model's)")
    add("--seed", type=numbers(int, 0), default=(0,), metavar="SEED,...",
        help="seed of all random numbers; several make a run each (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is bfloat16 on devices that compute in it")
    switch("--cuda_graphs", help="on GPUs, capture each step as a CUDA graph and replay it for later batches")
    add("--resume", type=Path, metavar="PATH",
        help="MAR's weights: a file, or a folder with checkpoint-last.pth (default: the model's, in pretrained_models)")
    add("--vae_path", type=Path, metavar="FILE", help="the VAE's weights (default: the model's, in pretrained_models)")
    add("--statistics", type=Path, metavar="FILE", help="reference of the scores, see score.py (default: the model's)")
    add("--inception_weights", type=Path, metavar="FILE",
        help="weights of torch-fidelity's Inception (default: PyTorch's hub folder, downloaded if missing)")
    add("--output_dir", type=Path, metavar="FOLDER",
        help="folder of the run; the same command continues it (default: output/ and a name made of the settings)")
    switch("--save_images", help="write every image as a PNG; if off, only those of the image grid")
    switch("--score", help="compute FID and Inception Score; if off, no statistics are needed")
    add("--overwrite", action="store_true", help="delete the run that --output_dir holds, and start anew")
    add_metric_flags(parser)

    # A flag for each setting of `Method` and `CachePolicy`; what is not given is not in the namespace.
    add = parser.add_argument_group("method", "a method sets all of these; each flag replaces one of its settings",
                                    argument_default=SUPPRESS).add_argument
    add("--method", default=None, metavar="NAME",
        help=f"{', '.join(METHODS)}, or several joined by +, such as lazymar+disa (default: mar)")
    add("--lazy_mar", action="store_true", default=False, help="sample with LazyMAR's caches: --method lazymar")
    add("--num_stages", type=number(int, 1), metavar="N",
        help="stages of the order of prediction: 1 is a random order; with 2, a checkerboard's black tokens come "
             "before its white ones; each further stage halves the first one (default: 1)")
    add("--num_iter", type=_steps_of_stages, metavar="N,...",
        help="autoregressive steps; with several stages a number for each, e.g. 24,6,2 (default: 64)")
    add("--tokens_per_step", type=numbers(int, 1), metavar="N,...",
        help="tokens of each autoregressive step, in place of --num_iter and --token_schedule")
    add("--token_schedule", choices=TOKEN_SCHEDULES, help="how many tokens the steps predict (default: cosine)")
    add("--num_sampling_steps", type=_denoising_steps, metavar="N or UPPER:LOWER:SCHEDULE or solver:N",
        help="denoising steps of the head; 50:5:linear falls from 50 to 5 (or: cosine, generation); "
             "solver:8 and eMIGM's solver:8:singlestep evaluate the head 8 times (default: 100)")
    add("--temperature", type=number(float, 0), metavar="X",
        help="scale of the denoising steps' noise; with a solver, of the initial noise (default: 1)")
    add("--guidance_interval", type=_interval, metavar="T_MIN:T_MAX or none",
        help="guide only the steps that end in this interval of time, which falls from 1 to 0, e.g. 0.1:0.3")
    add("--detailed_tokens", type=_detailed_tokens, metavar="SHARE:N or none",
        help="this share of the last stage's tokens gets N denoising steps, e.g. 0.1:50")
    add("--unguided_below", type=number(float, 1), metavar="SCALE",
        help="no guidance at steps whose CFG scale is below this (default: 1)")
    add("--lazy_sampling_steps", type=int, metavar="N", help="maximum number of denoising steps at lazy steps")

    add = parser.add_argument_group("caches", "settings of a method that caches; the defaults are LazyMAR's",
                                    argument_default=SUPPRESS).add_argument
    add("--start_step", type=_steps_or_fraction, metavar="N or FRACTION",
        help="steps before this one are refresh steps; below 1: a fraction of all steps; with stages or the token "
             "schedule exp, scaled from 64 steps (default: 5)")
    add("--refresh_interval", type=number(int, 1), metavar="N",
        help="from then on, one step in this many is a refresh step; scaled likewise (default: 9)")
    add("--refresh_steps", type=numbers(int, 0), metavar="STEP,...", help="the refresh steps, in place of these two")
    add("--prune_layer", type=number(int, 0), metavar="N",
        help="decoder block that chooses rows: from its attention on only these are recomputed (default: 3)")
    add("--recomputed_fractions", type=_step_fractions, metavar="STEP:FRACTION,...",
        help="from this step of 64 on, recompute this fraction of the rows (default: "
             "0:1,20:0.6,21:0.5,25:0.4,30:0.15,35:0.12,40:0.05)")
    add("--min_margin", type=number(int, 0), metavar="N",
        help="minimum number of rows to recompute besides the tokens predicted at this and the previous step "
             "(default: 15)")
    add("--selection", choices=RULES,
        help="recompute rows whose values (similarity), keys or inputs (outputs) changed most, or random rows "
             "(default: similarity)")
    add("--head_refresh_interval", type=_steps_or_fraction, metavar="N or FRACTION",
        help="one in this many denoising steps runs the whole head; below 1: a fraction of the chain; scaled from 100 "
             "steps if their number falls (default: 7)")
    add("--head_skipped_blocks", type=numbers(int, 0), metavar="N,...", help="head blocks to skip (default: 1,2,3,4)")
    add("--head_warmup", type=number(float, 0, 1), metavar="X",
        help="the other head blocks are computed in the first 1 - X of the denoising steps (default: 0.9)")
    add("--condition_interval", type=number(int, 1), metavar="N",
        help="every so many steps after a refresh step, both branches are computed (default: at refresh steps only)")
    add("--token_cache", action=BooleanOptionalAction, help="reuse the features of most tokens (default: on)")
    add("--condition_cache", action=BooleanOptionalAction, help="reuse the branches' difference (default: on)")
    add("--head_cache", action=BooleanOptionalAction,
        help="reuse the head's features between steps, except with a solver (default: on)")
    for action in parser._actions:
        if isinstance(action.type, FunctionType) and action.type.__name__.startswith("_"):
            action.type.__name__ = str(action.metavar)  # for "invalid N or FRACTION value"
    return parser
# fmt: on


def _method_of(args: argparse.Namespace) -> Method:
    """Return the method that --method and the flags of its settings ask for.

    Raises InputError for an unknown method, for flags that contradict each other, and for values out of range.
    """
    settings, policy = (
        {field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)}
        for kind in (Method, CachePolicy)
    )
    try:
        if {"tokens_per_step", "num_iter"} <= settings.keys():
            raise InputError("--tokens_per_step takes the place of --num_iter: leave one of them out")
        method = find_method(args.method_name, args.model, getattr(args, "num_iter", None))
        if args.lazy_mar and method.cache != METHODS["lazymar"].cache:
            raise InputError(f"--lazy_mar means --method lazymar, not --method {args.method}: leave one of them out")
        if policy:
            if method.cache is None:
                raise InputError(f"--{next(iter(policy))} needs caches: give --lazy_mar too, or a --method that caches")
            settings["cache"] = replace(method.cache, **policy)
        return replace(method, **settings)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def method_settings(method: Method) -> dict[str, Any]:
    """Return the settings of a method and, if it has any, of its caches, by the names of their flags."""
    caches = vars(method.cache) if method.cache else {}
    return {**vars(method), **caches, "cache": method.cache is not None}


def describe_method(name: str, method: Method) -> str:
    """Return the name of a method and the settings that replace its own, such as "lazymar, num_iter 32"."""
    own = method_settings(find_method(name))
    return ", ".join([name, *(f"{key} {value}" for key, value in method_settings(method).items() if own[key] != value)])


def _steps_of_stages(text: str) -> int | tuple[int, ...]:
    return tuple(map(int, text.split(","))) if "," in text else int(text)


def _denoising_steps(text: str) -> int | AnnealedSteps | SolverSteps:
    if ":" not in text:
        return int(text)
    first, second, *rule = text.split(":", 2)
    if first == "solver":
        return _made(SolverSteps, int(second), *rule)
    return _made(AnnealedSteps, int(first), int(second), *rule)


def _detailed_tokens(text: str) -> DetailedTokens | None:
    if text == "none":
        return None
    share, steps = text.split(":")
    return _made(DetailedTokens, float(share), int(steps))


def _interval(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    t_min, t_max = text.split(":")
    return float(t_min), float(t_max)


def _made(kind: Callable[..., Any], *values: Any) -> Any:
    """Return `kind(*values)`; argparse shows its own message if it refuses them."""
    try:
        return kind(*values)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _steps_or_fraction(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _step_fractions(text: str) -> tuple[tuple[int, float], ...]:
    pairs = (item.split(":") for item in text.split(","))
    return tuple((int(step), float(fraction)) for step, fraction in pairs)
