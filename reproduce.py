"""Evaluate the models of the paper's table, other methods, and LazyMAR's ablations, and draw a page of the results.

    torchrun --nproc_per_node=2 reproduce.py
    python reproduce.py --models mar_tiny --num_images 300

Each evaluation is one of eval.py, in a folder of its own. The same command continues what was cut off, on any number of
processes, and ends by writing report.html, with its pictures beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval import evaluate
from models.presets import MAR_MODELS, PRESETS
from util import machine
from util.cli import Parser, number
from util.condition_errors import make_teacher, measure_policies
from util.errors import InputError
from util.extractors import FEATURES_DIMS, load_extractor
from util.files import atomic_write
from util.folder import check_folder
from util.memory import memory_needed
from util.metrics import Statistics, add_metric_flags, metrics_from_flags
from util.options import Options
from util.processes import Job, launch
from util.redundancy import measure_redundancy
from util.report.page import write_page
from util.report.paper import PARAMETERS, TABLE, PaperRow
from util.report.results import Row
from util.study import ABLATION_IMAGES, ABLATIONS, METHODS_COMPARED, SMALL_MODEL, TABLE_METHODS, Study
from util.timing import matmul_rate
from util.weights import find_weights, load_model

# Share of the matmul rate that sampling reaches, roughly, by bytes per number: small operations cost bfloat16 more.
SHARES_OF_RATE = {2: 0.3, 4: 0.5, 8: 0.5}
COSTS = (
    "method                    refresh lazy    rows denoising  TFLOPs  paper   code     GB  1 image      all "
    "     FID     IS  paper  paper"
)


def main(job: Job) -> None:
    study = Study(parse_args())
    args = study.args
    device = machine.choose_device(args.device, job.local_rank)
    dtype = machine.choose_dtype(args.dtype, device)
    if args.dry_run:
        job.share(lambda: print_costs(study, device, dtype, job.world_size))
        return
    missing = job.share(lambda: check_runs(study, device, dtype))
    for model in filter(missing.get, missing):
        job.print0(f"note: {model} is skipped: {missing[model]}")
    runs = [options for options in study.runs() if not missing[options.model]]
    steps = {}
    for count, options in enumerate(runs, start=1):
        job.print0(f"\nrun {count} of {len(runs)}: {options.output_dir}")
        metrics = evaluate(job, options)
        if options == study.table[options.model, "mar"]:
            measure = partial(measure_steps, study, options, metrics["settings"], device)
            steps[options.model] = job.share(measure)
    job.share(lambda: print(f"\nthe page is {write_page(study, steps)}, with its pictures beside it", flush=True))


def measure_steps(study: Study, options: Options, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Measure how steps of a finished baseline resemble each other, and the errors of the ablations' conditions.

    The result is kept in the run's folder. It takes a few dozen images, whose scores do not matter.
    """
    file, num_images = options.output_dir / "steps.json", study.args.ablation_images
    asked = {"settings": settings, "num_images": num_images, "ablations": study.args.ablations}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(file.read_text())
        if found["asked"] == asked:
            return found
    print(f"measuring the conditions of {num_images} images of {options.model}", flush=True)
    paths = {"weights": options.resume, "vae_weights": options.vae_path}
    model, _ = load_model(options.model, device, torch.float32, **paths)
    teacher = make_teacher(model, options.plan.schedule, torch.arange(num_images) % model.class_num, options.seed)
    found = {
        "asked": asked,
        "redundancy": measure_redundancy(model, teacher),
        "ablations": measure_policies(model, teacher, study.ablations),
    }
    with atomic_write(file) as partial_file:
        partial_file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def check_runs(study: Study, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Return, by model, what keeps it from running; raise InputError if a folder holds a run with other settings."""
    for options in study.runs():
        if not options.overwrite:
            check_folder(options.output_dir, options.settings(device, dtype))
    return {model: missing_file(study.table[model, "mar"], fetch=True) for model in study.args.models}


def missing_file(options: Options, *, fetch: bool) -> str | None:
    """Return which file an evaluation lacks and how to get it; None if it lacks nothing.

    `fetch` Inception's weights if need be.
    """
    try:
        find_weights(options.resume, options.model)
        find_weights(options.vae_path, "the VAE")
        if not options.statistics.exists():
            Statistics.load(options.statistics, FEATURES_DIMS[options.preset.features])
        if fetch:
            load_extractor(options.preset.features, options.inception_weights)
    except InputError as error:
        return str(error)
    return None


def print_costs(study: Study, device: torch.device, dtype: torch.dtype, num_processes: int) -> None:
    """Print what each model and method costs beside the paper's figures, and how long the study takes."""
    matmuls, share = matmul_rate(device, dtype), SHARES_OF_RATE[dtype.itemsize]
    rate = matmuls * share
    name = f"{machine.processor_name(device)}: {matmuls / 1e12:.2f} TFLOP/s in {machine.dtype_name(dtype)} matmuls"
    print(f"{name}\nTimes are estimates for one process, at {share:.0%} of that rate, without decoding and scoring.")
    for model in study.args.models:
        rows = [Row(study.options(model, name)) for name in dict.fromkeys((*TABLE_METHODS, *study.args.method))]
        size = f"{rows[0].num_parameters / 1e6:.1f} M parameters"
        size += f" (paper: {PARAMETERS[model] / 1e6:.0f} M)" if model in PARAMETERS else ""
        first = rows[0].options
        print(f"\n{model}: {size}; {first.num_images:,} images in batches of {first.eval_bsz}\n{COSTS}")
        for row in rows:
            print(describe(row, dtype, rate), flush=True)
        if reason := missing_file(study.table[model, "mar"], fetch=False):
            print(f"cannot run: {reason}", flush=True)
    runs = [Row(options) for options in study.runs()]
    seconds = sum(row.flops * row.options.num_images for row in runs) / rate / num_processes
    print(f"\n{len(runs)} runs in all: about {duration(seconds)} of sampling with {num_processes} process(es)")


def describe(row: Row, dtype: torch.dtype, rate: float) -> str:
    """Describe the plan and the costs of an evaluation in a line below `COSTS`, given the FLOP/s of sampling."""
    options, plan = row.options, row.options.plan
    kept = [step.num_recomputed for step in plan if not step.refresh]
    rows = f"{kept[0]}-{kept[-1]}" if kept else ""
    paper = TABLE.get((options.model, options.method_name), PaperRow(*[math.nan] * len(PaperRow._fields)))
    memory = memory_needed(options.meta_model, plan, options.eval_bsz, dtype)
    seconds = row.flops / rate
    scores = f"{row.fid:8.2f} {row.inception_score or math.nan:6.1f}" if row.fid else " not run       "
    return (
        f"{options.method_name:26s} {len(plan) - len(kept):6d} {len(kept):4d} {rows:>7s} "
        f"{plan.head_evaluations:9,d} {row.flops / 1e12:7.3f} {paper.tflops:6.2f} {paper.counted_tflops:6.2f} "
        f"{memory / 1e9:6.2f} {duration(seconds):>7s} {duration(seconds * options.num_images):>8s} "
        f"{scores} {paper.fid:6.2f} {paper.inception_score:6.1f}".replace("nan", "  –")
    )


def duration(seconds: float) -> str:
    """Write a number of seconds in seconds, minutes, hours or days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s"


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be asked for."""
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    add = parser.add_argument
    count = number(int, 1)
    add("--models", nargs="+", choices=PRESETS, default=list(MAR_MODELS), metavar="MODEL", help="models to evaluate")
    add("--num_images", type=count, metavar="N", help=f"images of a run (default: 50000, and 2000 of {SMALL_MODEL})")
    add("--eval_bsz", type=count, metavar="N", help=f"batch size (default: 128, and 25 of {SMALL_MODEL})")
    add("--num_iter", type=count, default=64, metavar="N", help="autoregressive steps of methods without stages")
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
    add("--ablation_images", type=number(int, 2), default=ABLATION_IMAGES, metavar="N",
        help="images whose conditions are compared with the baseline's, for the ablations")
    add("--method", nargs="+", default=METHODS_COMPARED, metavar="NAME",
        help=f"methods to compare on {SMALL_MODEL}, see eval.py, or none")
    add("--output_dir", type=Path, default=Path("output/reproduce"), metavar="FOLDER", help="folder of runs and page")
    add("--overwrite", action="store_true", help="delete the runs that are there, and make them again")
    add("--dry_run", action="store_true", help="print plans, FLOPs, memory and estimated times, and write nothing")
    args = parser.parse_args(argv)
    args.metrics = () if args.dry_run else metrics_from_flags(args)
    args.models = [model for model in PRESETS if model in args.models]
    args.method = [name.lower() for name in args.method if name != "none"]
    args.ablations = [name for name in ABLATIONS if {name, "all"} & set(args.ablations)]
    return args
# fmt: on


if __name__ == "__main__":
    sys.exit(launch(main))
