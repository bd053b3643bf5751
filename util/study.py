"""What `reproduce.py` evaluates, each as a command of `eval.py`: the paper's table and other methods; and ablations."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from models import CachePolicy, find_method
from models.lazymar.selection import RULES
from models.presets import MAR_MODELS
from util.errors import InputError
from util.options import Options, parse_options

SMALL_MODEL = "mar_tiny"  # the model of the comparison of methods
TABLE_METHODS = ("mar", "lazymar")
COMPOSITIONS = ("lazymar+disa", "lazymar+gtr", "lazymar+disa+lateguidance", "lazymar+gtr+lateguidance")
METHODS_COMPARED = (*TABLE_METHODS, "disa", "gtr", "recap", *COMPOSITIONS, "fast")
ABLATION_IMAGES = 20


def rows_kept(factor: float) -> CachePolicy:
    """Return LazyMAR's policy with `factor` times the paper's rows."""
    fractions = tuple((step, min(1.0, factor * fraction)) for step, fraction in PAPER.kept_fractions)
    return CachePolicy(kept_fractions=fractions, min_margin=int(factor * PAPER.min_margin))


# One setting of LazyMAR is varied, and the others keep the paper's values. The head's cache changes no condition.
PAPER, ALL_ROWS = CachePolicy(), ((0, 1.0),)
ABLATIONS = {
    "caches": {
        "both": PAPER,
        "token cache": CachePolicy(condition_cache=False),
        "token cache of the encoder": CachePolicy(condition_cache=False, kept_fractions=ALL_ROWS),
        "condition cache": CachePolicy(token_cache=False),
    },
    "refresh_interval": {str(steps): CachePolicy(refresh_interval=steps) for steps in (3, 5, 7, 9, 11, 13, 17)},
    "start_step": {str(step): CachePolicy(start_step=step) for step in (0, 5, 10, 20)},
    "prune_layer": {str(block): CachePolicy(prune_layer=block) for block in (0, 1, 3, 5)},
    "rows_kept": {
        "half": rows_kept(0.5),
        "as listed": PAPER,
        "twice": rows_kept(2),
        "all": CachePolicy(kept_fractions=ALL_ROWS),
    },
    "selection": {rule: CachePolicy(selection=rule) for rule in RULES},
    "condition_interval": {str(steps): CachePolicy(condition_interval=steps) for steps in (None, 5, 3, 2)},
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
    ablations: cache policies by ablation and label.

    Raises InputError for an unknown method, and for an ablation without a lazy step.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        models = dict.fromkeys([*MAR_MODELS, *args.models])
        self.table = {(model, name): self.options(model, name) for model in models for name in TABLE_METHODS}
        self.methods = {name: self.options(SMALL_MODEL, name) for name in args.method}
        self.ablations = {name: ABLATIONS[name] for name in args.ablations}
        for name, group in self.ablations.items():
            for label, policy in group.items():
                if all(policy.is_refresh(step, args.num_iter) for step in range(args.num_iter)):
                    raise InputError(
                        f"--ablations {name}: with {label}, none of {args.num_iter} steps is lazy: leave it out, or "
                        "raise --num_iter"
                    )

    def runs(self) -> Iterator[Options]:
        """Yield the options of each evaluation of `--models`, each once."""
        for model in self.args.models:
            runs = [self.table[model, name] for name in TABLE_METHODS]
            if model == SMALL_MODEL:
                runs += self.methods.values()
            yield from {options.output_dir: options for options in runs}.values()

    def options(self, model: str, method: str) -> Options:
        """Return the options of an evaluation, in a folder named by its method."""
        args, is_small = self.args, model == SMALL_MODEL
        # Statistics and further scores go with one kind of features: the official models', unless they are left out.
        is_meant = not is_small or args.models == [SMALL_MODEL]
        flags = {
            "model": model,
            "num_images": args.num_images or (2_000 if is_small else 50_000),
            "eval_bsz": args.eval_bsz or (25 if is_small else 128),
            "seed": args.seed,
            "device": args.device,
            "dtype": args.dtype,
            "inception_weights": None if is_small else args.inception_weights,
            "statistics": args.statistics if is_meant else None,
            "output_dir": args.output_dir / model / method,
        }
        switches = [f"--{metric}" for metric in args.metrics if is_meant and method in TABLE_METHODS]
        switches += ["--overwrite"] * args.overwrite + ["--no-score"] * args.dry_run
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        steps = method_flags(method, args.num_iter, args.num_sampling_steps)
        return parse_options([*given, *switches, *steps])
