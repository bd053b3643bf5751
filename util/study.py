"""What `reproduce.py` evaluates: the paper's table, other methods, and ablations, each as a command of `eval.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from models import CachePolicy, find_method
from models.presets import MAR_MODELS
from util.errors import InputError
from util.options import Options, parse_options

SMALL_MODEL = "mar_tiny"  # the model of the ablations and of the comparison of methods
TABLE_METHODS = ("mar", "lazymar")
COMPOSITIONS = ("lazymar+disa", "lazymar+gtr", "lazymar+disa+lateguidance", "lazymar+gtr+lateguidance")
METHODS_COMPARED = (*TABLE_METHODS, "disa", "gtr", "recap", *COMPOSITIONS, "fast")
ABLATION_IMAGES = 500


def rows_kept(factor: float) -> str:
    """Return the flags that keep `factor` times the paper's rows."""
    policy = CachePolicy()
    fractions = ",".join(f"{step}:{min(1.0, factor * fraction):g}" for step, fraction in policy.kept_fractions)
    return f"--kept_fractions {fractions} --min_margin {int(factor * policy.min_margin)}"


# One setting of LazyMAR is varied, and the others keep the paper's values: the flags of each value, by its label.
ABLATIONS = {
    "caches": {
        "token cache": "--no-condition_cache --no-head_cache",
        "condition cache": "--no-token_cache --no-head_cache",
        "head cache": "--no-token_cache --no-condition_cache",
        "all three": "",
    },
    "refresh_interval": {str(steps): f"--refresh_interval {steps}" for steps in (3, 5, 7, 9, 11, 13, 17)},
    "start_step": {str(step): f"--start_step {step}" for step in (0, 5, 10, 20)},
    "prune_layer": {str(block): f"--prune_layer {block}" for block in (0, 1, 3, 5)},
    "rows_kept": {"half": rows_kept(0.5), "as listed": "", "twice": rows_kept(2), "all": "--kept_fractions 0:1"},
    "selection": {"similarity": "", "chance": "--selection random"},
}


def method_flags(method: str, num_iter: int, num_sampling_steps: int) -> list[str]:
    """Return the flags of a method with these numbers of steps, unless it has numbers of its own.

    Raises InputError for an unknown method.
    """
    try:
        own = find_method(method).changes
    except ValueError as error:
        raise InputError(f"--{error}") from None
    steps = {"num_iter": num_iter, "num_sampling_steps": num_sampling_steps}
    return ["--method", method, *(f"--{name}={count}" for name, count in steps.items() if name not in own)]


class Study:
    """The evaluations that a command of `reproduce.py` asks for.

    table:     options by model and method, of all models.
    methods:   options of mar_tiny by method.
    ablations: options of mar_tiny by ablation and label.

    Raises InputError for an unknown method, and for more images in the ablations than the baseline has.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        models = dict.fromkeys([*MAR_MODELS, *args.models])
        self.table = {(model, name): self.options(model, name) for model in models for name in TABLE_METHODS}
        self.methods = {name: self.options(SMALL_MODEL, name) for name in args.method}
        available = self.table[SMALL_MODEL, "mar"].num_images
        self.num_compared = args.ablation_images or min(ABLATION_IMAGES, available)
        if args.ablations and SMALL_MODEL in args.models and self.num_compared > available:
            raise InputError(f"--ablation_images must be at most {available}, the images of {SMALL_MODEL}'s baseline")
        self.ablations = {
            name: {label: self._ablated(f"{name}-{label}", flags.split()) for label, flags in ABLATIONS[name].items()}
            for name in args.ablations
        }

    def runs(self) -> Iterator[Options]:
        """Yield the options of each evaluation of `--models`, each once."""
        for model in self.args.models:
            runs = [self.table[model, name] for name in TABLE_METHODS]
            if model == SMALL_MODEL:
                runs += self.methods.values()
                runs += [options for values in self.ablations.values() for options in values.values()]
            yield from {options.output_dir: options for options in runs}.values()

    def options(self, model: str, method: str, folder: str = "", more: Sequence[str] = ()) -> Options:
        """Return the options of an evaluation, in a folder named by its method unless it is an ablation's `folder`."""
        args, is_small = self.args, model == SMALL_MODEL
        # Statistics and further scores go with one kind of features: the official models', unless they are left out.
        is_meant = not is_small or args.models == [SMALL_MODEL]
        flags = {
            "model": model,
            "num_images": self.num_compared if folder else args.num_images or (2_000 if is_small else 50_000),
            "eval_bsz": args.eval_bsz or (25 if is_small else 128),
            "seed": args.seed,
            "device": args.device,
            "dtype": args.dtype,
            "inception_weights": None if is_small else args.inception_weights,
            "statistics": args.statistics if is_meant else None,
            "output_dir": args.output_dir / model / (folder or method),
        }
        switches = [f"--{metric}" for metric in args.metrics if is_meant and method in TABLE_METHODS and not folder]
        switches += ["--overwrite"] * args.overwrite + ["--no-score"] * args.dry_run
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        steps = method_flags(method, args.num_iter, args.num_sampling_steps)
        return parse_options([*given, *switches, *steps, *more])

    def _ablated(self, name: str, flags: Sequence[str]) -> Options:
        """Return the options of an ablation; those of LazyMAR's own run where the value is the paper's."""
        lazymar = self.table[SMALL_MODEL, "lazymar"]
        options = self.options(SMALL_MODEL, "lazymar", f"ablations/{name}".replace(" ", "-"), flags)
        return lazymar if options.method == lazymar.method else options
