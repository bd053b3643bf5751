"""What `reproduce.py` evaluates, each as a command of `eval.py`: the paper's table and other methods; and ablations."""

import argparse

from models import CachePolicy, find_method
from models.lazymar.selection import RULES
from models.presets import MAR_MODELS
from util.errors import InputError
from util.options import Options, parse_options

SMALL_MODEL = "mar_tiny"  # the model of the comparison of methods
TABLE_METHODS = ("mar", "lazymar")
COMPOSITIONS = ("lazymar+disa", "lazymar+gtr", "lazymar+disa+lateguidance", "lazymar+gtr+lateguidance")
METHODS_COMPARED = (*TABLE_METHODS, "disa", "gtr", "recap", *COMPOSITIONS, "fast")


# One setting of LazyMAR is varied, and the others keep the paper's values. The head's cache changes no condition.
PAPER, ALL_ROWS = CachePolicy(), ((0, 1.0),)


def rows_recomputed(factor: float) -> CachePolicy:
    """Return LazyMAR's policy with `factor` times the paper's rows."""
    fractions = tuple((step, min(1.0, factor * fraction)) for step, fraction in PAPER.recomputed_fractions)
    return CachePolicy(recomputed_fractions=fractions, min_margin=int(factor * PAPER.min_margin))


ABLATIONS = {
    "caches": {
        "both": PAPER,
        "token cache": CachePolicy(condition_cache=False),
        "token cache of the encoder": CachePolicy(condition_cache=False, recomputed_fractions=ALL_ROWS),
        "condition cache": CachePolicy(token_cache=False),
    },
    "refresh_interval": {str(steps): CachePolicy(refresh_interval=steps) for steps in (3, 5, 7, 9, 11, 13, 17)},
    "start_step": {str(step): CachePolicy(start_step=step) for step in (0, 5, 10, 20)},
    "prune_layer": {str(block): CachePolicy(prune_layer=block) for block in (0, 1, 3, 5)},
    "rows_recomputed": {
        "half": rows_recomputed(0.5),
        "as listed": PAPER,
        "twice": rows_recomputed(2),
        "all": CachePolicy(recomputed_fractions=ALL_ROWS),
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


def runs_of(args: argparse.Namespace) -> dict[tuple[str, str], Options]:
    """Return the options of each evaluation that the page shows, by model and method; `--models` says which are made.

    Each is in a folder named by its model and method. Raises InputError for an unknown method.
    """
    asked = [(model, method) for model in dict.fromkeys([*MAR_MODELS, *args.models]) for method in TABLE_METHODS]
    asked += [(SMALL_MODEL, method) for method in ("mar", *args.method)]
    runs = {}
    for model, method in asked:
        is_small = model == SMALL_MODEL
        flags = [
            *(f"--model={model}", f"--seed={args.seed}", f"--device={args.device}", f"--dtype={args.dtype}"),
            f"--num_images={args.num_images or (2_000 if is_small else 50_000)}",
            f"--eval_bsz={args.eval_bsz or (25 if is_small else 128)}",
            f"--output_dir={args.output_dir / model / method}",
            *["--overwrite"] * args.overwrite,
            *["--no-score"] * args.dry_run,
        ]
        if args.inception_weights and not is_small:
            flags.append(f"--inception_weights={args.inception_weights}")
        # Statistics and further scores go with one kind of features: the official models', unless they are left out.
        if not is_small or args.models == [SMALL_MODEL]:
            flags += [f"--statistics={args.statistics}"] * bool(args.statistics)
            flags += [f"--{metric}" for metric in args.metrics if method in TABLE_METHODS]
        flags += method_flags(method, args.num_iter, args.num_sampling_steps)
        runs[model, method] = parse_options(flags)
    return runs
