"""Fill in the paper's main table from the models at hand, vary LazyMAR's settings, and measure what its caches live on
and what other methods and compositions achieve.

    torchrun --nproc_per_node=2 reproduce.py
    python reproduce.py --models mar_tiny --num_images 300 --ablation_images 100

The same command continues what was cut off, on any number of processes. `report.py` makes a page of the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eval import evaluate
from models import PRESETS, Method
from models.lazymar.methods import LAZYMAR
from util import machine
from util.cli import Parser
from util.errors import InputError
from util.job.processes import Job, launch
from util.reproduction.ablations import ABLATED_MODEL, ABLATIONS, choose_ablations
from util.reproduction.comparison import compare_with_baseline, is_whole, score_method
from util.reproduction.costs import num_parameters, print_costs, time_random_model
from util.reproduction.frontier import FRONTIER, choose_frontier, costs_of
from util.reproduction.paper import TABLE_METHODS, name_in_table
from util.reproduction.redundancy import measure_redundancy
from util.reproduction.results import (
    Comparison,
    Conditions,
    Evaluation,
    FrontierPoint,
    Inputs,
    Record,
    Redundancy,
    Results,
    Row,
    T,
)
from util.reproduction.study import ABLATION_IMAGES, Study, inputs_of, missing_file
from util.runs.folder import holds_other_run
from util.runs.methods import add_steps, in_words
from util.runs.options import CheckedOptions, Options
from util.runs.run import find_all_weights, weights_digests
from util.scoring.scores import Metrics
from util.weights.models import load_model

REDUNDANCY_IMAGES = 8
LATENCY_SECONDS = 60  # for an image on a CPU; what takes longer is extrapolated


def reproduce(job: Job, args: argparse.Namespace) -> None:
    """Measure the table's rows, the ablations, the frontier and the redundancy, as far as that is not done yet."""
    study = Study.of(args)
    device = machine.choose_device(study.device, job.local_rank)
    dtype = machine.choose_dtype(study.dtype, device)
    if args.dry_run:
        job.share(lambda: print_costs(study, device, dtype, job.world_size))
        return
    if not study.overwrite:
        job.share(lambda: study.check_folders(device, dtype))
    reproduction = Reproduction(job, study, device, dtype, Results(study.output_dir / "results"))
    for model in PRESETS:
        for in_table in TABLE_METHODS:
            measure_row(reproduction, model, in_table)
    settings = study.settings()
    if settings and not reproduction.missing_file(ABLATED_MODEL):
        compare_policy(reproduction, None, "baseline", Method())
        for number, (ablation, label, policy) in enumerate(settings, start=1):
            job.print0(f"\nablation {number} of {len(settings)}")
            compare_policy(reproduction, ablation, label, Method(cache=policy))
    for number, (name, method) in enumerate(study.method.items(), start=1):
        job.print0(f"\nfrontier, {number} of {len(study.method)}")
        measure_point(reproduction, name, method)
    for model in study.models:
        if not reproduction.missing_file(model):
            compare_steps(reproduction, model)
    job.print0(f"\nresults are in {reproduction.results.folder}; report.py makes a page of them")


@dataclass(frozen=True)
class Reproduction:
    """One command's processes, what it asks of them, and the results."""

    job: Job
    study: Study
    device: torch.device
    dtype: torch.dtype
    results: Results

    def missing_file(self, model: str) -> str | None:
        """The file that evaluations of a model lack, in words; None if they lack nothing."""
        return self.job.share(lambda: missing_file(self.study.options(model, Method())))

    def keeping_what_is_wanted(self, run: CheckedOptions) -> CheckedOptions:
        """The options of an evaluation, which overwrite nothing but a run of other settings or weights."""

        def is_other() -> bool:
            settings = {**run.settings(self.device, self.dtype), **weights_digests(find_all_weights(run))}
            return holds_other_run(run.output_dir, settings)

        return replace(run, overwrite=run.overwrite and self.job.share(is_other))

    def measure_once(
        self,
        kind: type[T],
        name: str,
        title: str,
        inputs: Callable[[], Inputs],
        measure: Callable[[Evaluation | None], T],
        *,
        run: CheckedOptions | None = None,
        begun: Callable[[], T] | None = None,
        stands: Callable[[Record[T]], bool] | None = None,
    ) -> None:
        """Measure a result and write it, unless it is there. All ranks evaluate; rank 0 does everything else.

        Args:
            kind, name: the type of the result, and its name among the results.
            title:      printed before there is something to do.
            inputs:     what the result depends on, as it is now.
            measure:    makes the result, from the evaluation of `run` if there is one.
            run:        the evaluation that is needed.
            begun:      makes what is written until that has come to its end.
            stands:     whether an earlier result is kept. By default it is if it is finished and was made of the same
                        inputs, and no file of its run is lost.
        """

        def is_there(earlier: Record[T]) -> bool:
            if earlier.result.unfinished or earlier.inputs != inputs():
                return False
            return run is None or is_whole(run)

        def write(result: T) -> None:
            self.results.write(name, Record(result, inputs(), Conditions.now(self.device, self.job.world_size)))

        def begin() -> bool:
            try:
                earlier = self.results.read(kind, name)
            except InputError as error:
                print(f"note: {str(error).partition(':')[0]}; it is made anew", flush=True)
                earlier = None
            if earlier is not None and (stands or is_there)(earlier):
                if run is not None:
                    print(f"{title}: is there", flush=True)
                return False
            if begun is not None:
                write(begun())
            print(f"\n{title}:", flush=True)
            return True

        if self.job.share(begin):
            evaluation = None
            if run is not None:
                evaluation = Evaluation.of_metrics(evaluate(self.job, self.keeping_what_is_wanted(run)))
            self.job.share(lambda: write(measure(evaluation)))


def measure_row(reproduction: Reproduction, model: str, method: str) -> None:
    """Evaluate a model with one of the table's methods; without its weights, time an image with random ones.

    The FLOPs of a model that is not asked for are counted all the same.
    """
    options, is_wanted = reproduction.study.options(model, TABLE_METHODS[method]), model in reproduction.study.models
    title = f"{model}, {method}"
    not_run = reproduction.job.share(lambda: missing_file(options)) if is_wanted else "not among --models"
    if not_run:
        title += ": no weights; timing one image with random ones" if is_wanted else ": counting FLOPs"

    def row() -> Row:
        return Row(model, method, num_parameters(options.meta_model), options.flops, not_run)

    def inputs() -> Inputs:
        of_run = inputs_of(options, reproduction.device, reproduction.dtype, files=is_wanted)
        return replace(of_run, metrics=options.metrics.flags)

    def measure(evaluation: Evaluation | None) -> Row:
        if is_wanted and not_run:
            latency = time_random_model(
                options, reproduction.device, reproduction.dtype, batch_size=1, limit=LATENCY_SECONDS
            )
            return replace(row(), latency=latency)
        return replace(row(), evaluation=evaluation)

    def stands_without_run(earlier: Record[Row]) -> bool:
        if is_wanted:
            return earlier.result.is_timed and earlier.inputs.settings == inputs().settings
        return earlier.result.is_timed or earlier.result.unfinished or earlier.inputs == inputs()

    reproduction.measure_once(
        Row,
        Row.name(model, method),
        title,
        inputs,
        measure,
        run=None if not_run else options,
        begun=None if not_run else row,
        stands=stands_without_run if not_run else None,
    )


def compare_policy(reproduction: Reproduction, ablation: str | None, label: str, method: Method) -> None:
    """Evaluate a policy, unless it is a row of the table, and compare its images with the baseline's."""
    study = reproduction.study
    options, baseline = study.options(ABLATED_MODEL, method), study.options(ABLATED_MODEL, Method())
    in_table = name_in_table(method)

    def inputs() -> Inputs:
        of_run = inputs_of(options, reproduction.device, reproduction.dtype)
        return replace(of_run, num_images=study.num_compared, baseline_images=baseline.num_images)

    def compare(evaluation: Evaluation | None) -> Comparison:
        if in_table is not None:
            row = reproduction.results.read(Row, Row.name(ABLATED_MODEL, in_table))
            evaluation = row.result.evaluation if row else None
        assert evaluation is not None  # the table's rows come first
        return compare_with_baseline(options, baseline, study.num_compared, evaluation, ablation=ablation, label=label)

    name, title = Comparison.name(ablation, label), f"{ABLATED_MODEL}, {ablation or 'ablations'}: {label}"
    reproduction.measure_once(Comparison, name, title, inputs, compare, run=None if in_table else options)


def measure_point(reproduction: Reproduction, name: str, method: Method) -> None:
    """Evaluate the embedded model with a method, unless that is a row of the table, and count what it costs all models.

    Without the embedded model, or its weights, the costs are counted all the same.
    """
    study = reproduction.study
    options, lazymar = study.options(ABLATED_MODEL, method), study.options(ABLATED_MODEL, LAZYMAR)
    in_table, not_run = name_in_table(method), reproduction.missing_file(ABLATED_MODEL)
    if ABLATED_MODEL not in study.models:
        not_run = "not among --models"

    def inputs() -> Inputs:
        return inputs_of(options, reproduction.device, reproduction.dtype, files=not not_run)

    def measure(evaluation: Evaluation | None) -> FrontierPoint:
        costs = {model: costs_of(study.options(model, method)) for model in PRESETS}
        point = FrontierPoint(name, in_words(options.method), costs, not_run)
        if not_run:
            return point
        if in_table is not None:
            row = reproduction.results.read(Row, Row.name(ABLATED_MODEL, in_table))
            evaluation = row.result.evaluation if row else None
        return replace(point, evaluation=evaluation, scores=score_method(options, lazymar))

    def stands_without_run(earlier: Record[FrontierPoint]) -> bool:
        return earlier.inputs.settings == inputs().settings

    reproduction.measure_once(
        FrontierPoint,
        FrontierPoint.name(name),
        f"{ABLATED_MODEL}, {name}",
        inputs,
        measure,
        run=None if not_run or in_table else options,
        stands=stands_without_run if not_run else None,
    )


def compare_steps(reproduction: Reproduction, model: str) -> None:
    """Measure how much one step of the baseline is like those before."""
    options = reproduction.study.options(model, Method())

    def inputs() -> Inputs:
        return replace(inputs_of(options, reproduction.device, reproduction.dtype), num_images=REDUNDANCY_IMAGES)

    def measure(_: Evaluation | None) -> Redundancy:
        paths = {"weights": options.resume, "vae_weights": options.vae_path}
        network = load_model(model, reproduction.device, torch.float32, **paths)[0]
        return measure_redundancy(
            network,
            num_images=REDUNDANCY_IMAGES,
            seed=options.seed,
            cfg=options.cfg,
            method=options.method,
        )

    title = f"{model}: similarity between steps, over {REDUNDANCY_IMAGES} images"
    reproduction.measure_once(Redundancy, Redundancy.name(model), title, inputs, measure)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be asked for."""
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    parser.add("--models", str, "models to run", nargs="+", default=list(PRESETS), choices=PRESETS, metavar="MODEL")
    parser.add("--num_images", int, "images for each row of the table", minimum=1,
               default_text=f"50000, and 2000 of {ABLATED_MODEL}")  # fmt: skip
    parser.add("--eval_bsz", int, "batch size: images that each process samples at a time", minimum=1,
               default_text=f"128, and 25 of {ABLATED_MODEL}")  # fmt: skip
    add_steps(parser)
    parser.add_fields(Options, "seed", "device", "dtype", "inception_weights")
    parser.add_fields(Options, "statistics")
    parser.add_fields(Metrics, "precision_recall", "kid", "fd_dinov2")
    parser.add("--ablations", str, f"ablations of {ABLATED_MODEL}: all, none, or some of {', '.join(ABLATIONS)}",
               nargs="+", default=["all"], metavar="ABLATION")  # fmt: skip
    parser.add("--ablation_images", int, "images of each ablation, from the table's rows", minimum=1,
               default_text=f"{ABLATION_IMAGES}, or as many as there are")  # fmt: skip
    parser.add("--method", str, f"methods to compare on {ABLATED_MODEL}, see eval.py, or none",
               nargs="+", default=list(FRONTIER), metavar="NAME")  # fmt: skip
    parser.add("--output_dir", Path, "folder of runs and results", default=Path("output/reproduce"), metavar="FOLDER")
    parser.add("--overwrite", bool, "make again what was made with other settings")
    parser.add("--dry_run", bool, "print the plan, FLOPs, memory and an estimate of the time, and write nothing")
    args = parser.parse_args(arguments)
    choose_ablations(args.ablations)
    args.method = choose_frontier(args.method)
    args.metrics = Metrics(args.precision_recall, args.kid, args.fd_dinov2)
    args.models = [model for model in PRESETS if model in args.models]
    return args


def main(job: Job) -> None:
    reproduce(job, parse_args(None))


if __name__ == "__main__":
    sys.exit(launch(main))
