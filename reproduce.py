"""Evaluate the models of the paper's table, other methods, and LazyMAR's ablations, and draw a page of the results.

    torchrun --nproc_per_node=2 reproduce.py
    python reproduce.py --models mar_tiny --num_images 300

Each evaluation is one of eval.py, in a folder of its own. The same command continues what was cut off, on any number of
processes, and ends by writing report.html, with its pictures beside it.
"""

import argparse
import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmark import matmul_rate
from eval import evaluate
from models.presets import MAR_MODELS, PRESETS
from util import machine
from util.cli import Parser, number
from util.condition_errors import make_teacher, measure_policies, measure_redundancy
from util.errors import InputError
from util.extractors import FEATURES_DIMS
from util.files import atomic_write
from util.folder import check_folder
from util.metrics import Statistics, add_metric_flags, metrics_from_flags
from util.options import Options
from util.processes import Job, launch
from util.report.page import write_page
from util.report.paper import TABLE
from util.study import ABLATIONS, METHODS_COMPARED, SMALL_MODEL, runs_of
from util.weights import find_weights, load_model

# Share of the matmul rate that sampling reaches, roughly, by bytes per number: small operations cost bfloat16 more.
SHARES_OF_RATE = {2: 0.3, 4: 0.5, 8: 0.5}


def main(job: Job) -> None:
    args = parse_args()
    runs, device = runs_of(args), machine.choose_device(args.device, job.local_rank)
    dtype = machine.choose_dtype(args.dtype, device)
    asked = [options for (model, _), options in runs.items() if model in args.models]
    if args.dry_run:
        job.share(lambda: print_costs(asked, device, dtype, job.world_size))
        return
    for options in asked:
        job.share(partial(check_folder, options.output_dir, options.settings(device, dtype), options.overwrite))
    missing, steps = job.share(lambda: missing_files(asked)), {}
    for model, reason in missing.items():
        job.print0(f"note: {model} is skipped: {reason}")
    possible = [options for options in asked if options.model not in missing]
    for count, options in enumerate(possible, start=1):
        job.print0(f"\nrun {count} of {len(possible)}: {options.output_dir}")
        metrics = evaluate(job, options)
        if options == runs[options.model, "mar"]:
            steps[options.model] = job.share(partial(measure_steps, args, options, metrics["settings"], device))
    job.share(lambda: print(f"\nthe page is {write_page(args, runs, steps)}, with its pictures beside it", flush=True))


def measure_steps(
    args: argparse.Namespace, options: Options, settings: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Measure how steps of a finished baseline resemble each other, and the errors of the ablations' conditions.

    The result is kept in the run's folder. It takes a few dozen images, whose scores do not matter.
    """
    file, num_images = options.output_dir / "steps.json", args.ablation_images
    asked = {"settings": settings, "num_images": num_images, "ablations": list(args.ablations)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it is missing or damaged
        if (found := json.loads(file.read_text()))["asked"] == asked:
            return found
    print(f"measuring the conditions of {num_images} images of {options.model}", flush=True)
    model, _ = load_model(options.model, device, torch.float32, weights=options.resume, vae_weights=options.vae_path)
    teacher = make_teacher(model, options.plan.schedule, torch.arange(num_images) % model.class_num, options.seed)
    found = {"asked": asked, "redundancy": measure_redundancy(model, teacher)}
    found["ablations"] = measure_policies(model, teacher, args.ablations)
    with atomic_write(file) as partial_file:
        partial_file.write_text(json.dumps(found))
    return found


def missing_files(runs: list[Options]) -> dict[str, str]:
    """Return which file a model lacks and how to get it, by model."""
    missing = {}
    for options in runs:
        try:
            find_weights(options.resume, options.model)
            find_weights(options.vae_path, "the VAE")
            Statistics.load(options.statistics, FEATURES_DIMS[options.preset.features])
        except InputError as error:
            missing[options.model] = str(error)
    return missing


def print_costs(runs: list[Options], device: torch.device, dtype: torch.dtype, num_processes: int) -> None:
    """Print what each run costs beside the paper's figures, and how long the study takes."""
    rate, total = matmul_rate(device, dtype) * SHARES_OF_RATE[dtype.itemsize], 0.0
    print(f"{machine.processor_name(device)}, {machine.dtype_name(dtype)}, {num_processes} process(es)")
    print(f"Hours are estimates at {rate / 1e12:.2f} TFLOP/s per process, without decoding and scoring.")
    print(
        "model       method                      images refresh lazy    rows  TFLOPs     hours "
        " paper: TFLOPs  code    FID      IS"
    )
    for options in runs:
        plan, flops = options.plan, options.flops.total
        lazy = [step.num_recomputed for step in plan if not step.refresh]
        rows = f"{lazy[0]}-{lazy[-1]}" if lazy else "all"
        hours = flops * options.num_images / rate / num_processes / 3600
        total += hours
        published = TABLE.get((options.model, options.method_name), ())[2:]
        print(
            f"{options.model:11s} {options.method_name:26s} {options.num_images:7,d} {len(plan) - len(lazy):7d} "
            f"{len(lazy):4d} {rows:>7s} {flops / 1e12:7.3f} {hours:9.2f}     ",
            "".join(f"{figure:8.2f}" for figure in published),
            flush=True,
        )
    for model, reason in missing_files(runs).items():
        print(f"{model} cannot run: {reason}")
    print(f"{len(runs)} runs in all: about {total:.1f} hours of sampling")


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be asked for."""
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    add = parser.add_argument
    count = number(int, 1)
    add("--models", nargs="+", choices=PRESETS, default=list(MAR_MODELS), metavar="MODEL", help="models to evaluate")
    add("--num_images", type=count, metavar="N", help=f"images of a run (default: 50000, and 2000 of {SMALL_MODEL})")
    add("--eval_bsz", type=count, metavar="N", help=f"batch size (default: 128, and 25 of {SMALL_MODEL})")
    add("--num_iter", type=count, default=64, metavar="N", help="autoregressive steps where a method sets none")
    add("--num_sampling_steps", type=count, default=100, metavar="N", help="denoising steps where a method sets none")
    add("--seed", type=number(int, 0), default=0, metavar="SEED", help="seed of all images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--dtype", choices=("auto", *machine.DTYPES), default="auto", help="auto is bfloat16 where that is fast")
    add("--inception_weights", type=Path, metavar="FILE", help="weights of torch-fidelity's Inception")
    add("--statistics", type=Path, metavar="FILE",
        help=f"reference of the scores of the official models; of {SMALL_MODEL} if that is the only model")
    add_metric_flags(parser, standard_errors=False)
    add("--ablations", nargs="+", choices=("all", "none", *ABLATIONS), default=["all"], metavar="NAME",
        help=f"settings of LazyMAR to vary: all, none, or some of {', '.join(ABLATIONS)}")
    add("--ablation_images", type=number(int, 2), default=20, metavar="N",
        help="images whose conditions are compared with the baseline's, for the ablations")
    add("--method", nargs="+", default=METHODS_COMPARED, metavar="NAME",
        help=f"methods to compare on {SMALL_MODEL}, see eval.py, or none")
    add("--output_dir", type=Path, default=Path("output/reproduce"), metavar="FOLDER", help="folder of runs and page")
    add("--overwrite", action="store_true", help="delete the runs that are there, and make them again")
    add("--dry_run", action="store_true", help="print plans, FLOPs and estimated times, and write nothing")
    args = parser.parse_args(argv)
    args.metrics = () if args.dry_run else metrics_from_flags(args)
    args.models = [model for model in PRESETS if model in args.models]
    args.method = [name.lower() for name in args.method if name != "none"]
    args.ablations = {name: group for name, group in ABLATIONS.items() if {name, "all"} & set(args.ablations)}
    for name, group in args.ablations.items():
        for label, policy in group.items():
            if all(policy.is_refresh(step, args.num_iter) for step in range(args.num_iter)):
                raise InputError(f"--ablations {name}: with {label}, no step is lazy: leave it out or raise --num_iter")
    return args
# fmt: on


if __name__ == "__main__":
    sys.exit(launch(main))
