"""Fill in the paper's main table from the models at hand, with LazyMAR's ablations and what its caches live on.

    torchrun --nproc_per_node=2 reproduce.py
    python reproduce.py --models mar_tiny --num_images 300 --ablation_images 100

The same command continues what was cut off, on any number of processes. `report.py` makes a page of the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from eval import evaluate, load_models
from models import PRESETS, CachePolicy
from models.lazymar.flops import Flops
from models.lazymar.plan import make_plan
from util import machine
from util.cli import Parser
from util.errors import InputError
from util.files import file_digest
from util.job.processes import Job, launch
from util.reproduction.ablations import ABLATED_MODEL, ABLATIONS, choose_ablations, run_name
from util.reproduction.jackknife import groups_of_images, jackknife
from util.reproduction.redundancy import measure_redundancy
from util.reproduction.results import Results
from util.reproduction.timing import random_model, time_sampling
from util.runs.folder import RunFolder
from util.runs.memory import memory_needed
from util.runs.options import Options, check
from util.scoring.scores import FEATURES_DIMS, Statistics, load_extractor, score

METHODS = {"baseline": None, "lazymar": CachePolicy()}
METHOD_NAMES = {"baseline": "baseline", "lazymar": "LazyMAR"}
REDUNDANCY_IMAGES = 8
LATENCY_SECONDS = 60  # for an image on a CPU; what takes longer is extrapolated
ESTIMATE_SECONDS = 5  # likewise, for the time estimates of a dry run
ABLATION_IMAGES = 500


@dataclass(frozen=True)
class Reproduction:
    """What a command asks for, and where its results are."""

    job: Job
    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def results(self) -> Results:
        return Results(self.args.output_dir / "results")

    # What there is to do

    def options(self, model: str, cache: CachePolicy | None) -> Options:
        """Those of the evaluation behind a row or an ablation; the same policy is evaluated once."""
        args, is_official = self.args, model != ABLATED_MODEL
        folder = args.output_dir / model
        if cache in METHODS.values():
            folder /= next(method for method, policy in METHODS.items() if policy == cache)
            num_images = args.num_images or (50_000 if is_official else 2_000)
        else:
            names = [run_name(name, label) for name, kind in ABLATIONS.items() for label in kind.policies
                     if kind.policies[label] == cache]  # fmt: skip
            folder, num_images = folder / "ablations" / names[0], self.ablation_images
        return check(
            Options(
                model=model,
                num_images=num_images,
                eval_bsz=args.eval_bsz or (128 if is_official else 25),
                num_iter=args.num_iter,
                num_sampling_steps=args.num_sampling_steps,
                seed=args.seed,
                cache=cache,
                device=args.device,
                dtype=args.dtype,
                inception_weights=args.inception_weights if is_official else None,
                output_dir=folder,
            )
        )

    @cached_property
    def ablation_images(self) -> int:
        available = self.options(ABLATED_MODEL, None).num_images
        if (self.args.ablation_images or 1) > available:
            raise InputError(f"--ablation_images must be at most the {available} images of {ABLATED_MODEL}'s rows")
        return self.args.ablation_images or min(ABLATION_IMAGES, available)

    def ablations(self) -> list[tuple[str, str, CachePolicy]]:
        """(ablation, label, policy) of each that was asked for."""
        chosen = choose_ablations(self.args.ablations) if ABLATED_MODEL in self.args.models else {}
        return [(name, label, cache) for name, kind in chosen.items() for label, cache in kind.policies.items()]

    # What results depend on

    def inputs(self, options: Options, *, files: bool = True, **more: object) -> dict:
        """What a result depends on, with the digests of weights and statistics unless not `files`, as JSON has it."""
        inputs = {"settings": options.settings(self.device, self.dtype), **more}
        if files:
            paths = (options.resume, options.vae_path, options.statistics)
            inputs["files"] = {str(path): _digest(path) for path in paths}
        return json.loads(json.dumps(inputs))

    def previous(self, name: str) -> dict | None:
        """A result from an earlier command; None, and a note, if its file is damaged."""
        try:
            return self.results.read(name)
        except InputError as error:
            print(f"note: {str(error).partition(':')[0]}; it is made anew", flush=True)
            return None

    @staticmethod
    def is_finished(previous: dict | None, inputs: dict, options: Options) -> bool:
        """Whether a result and the run behind it are whole, and made of the same `inputs`."""
        if previous is None or previous["inputs"] != inputs or previous.get("unfinished"):
            return False
        return (options.output_dir / "metrics.json").exists() and not run_folder(options).unfinished()

    def write(self, name: str, result: dict) -> None:
        about = {"environment": machine.describe(self.device), "device": machine.where(self.device)}
        self.results.write(name, {**result, **about, "processes": self.job.world_size})

    # The table

    def row(self, model: str, method: str) -> None:
        """A row of the table: an evaluation where there are weights, else what can be measured without."""
        name, options = f"{model}-{method}", self.options(model, METHODS[method])
        wanted = model in self.args.models

        def begin() -> bool:
            """Write what is known without an evaluation. Returns whether there is to be one."""
            inputs = self.inputs(options, files=wanted)
            previous = self.previous(name)
            measured = previous and (previous["run"] or previous["latency"])
            if not wanted and previous and (measured or previous["unfinished"] or previous["inputs"] == inputs):
                return False
            if wanted and self.is_finished(previous, inputs, options):
                print(f"{model}, {METHOD_NAMES[method]}: is there", flush=True)
                return False
            missing = missing_file(options) if wanted else None
            if missing and measured and previous["inputs"]["settings"] == inputs["settings"]:
                return False
            result = {
                "model": model,
                "method": method,
                "inputs": inputs,
                "parameters": sum(parameter.numel() for parameter in options.shape.parameters()),
                "flops_per_step": options.flops,
                "missing": missing,
                "latency": self.latency(options) if missing else None,
                "run": None,
                "unfinished": wanted and not missing,
            }
            self.write(name, result)
            return result["unfinished"]

        def finish() -> None:
            self.write(name, {**self.results.read(name), "run": metrics, "unfinished": False})

        if self.job.share(begin):
            metrics = self.evaluate(options, f"{model}, {METHOD_NAMES[method]}")
            self.job.share(finish)

    def evaluate(self, options: Options, title: str) -> dict:
        self.job.print0(f"\n{title}:")
        return evaluate(self.job, dataclasses.replace(options, overwrite=self.args.overwrite))

    def latency(self, options: Options) -> dict:
        """One image's, with random weights."""
        print(f"{options.model}: no weights; timing one image with random ones", flush=True)
        model = random_model(options.model, self.device, self.dtype)
        measured = time_sampling(model, 1, options.flops, **options.sampling, seconds=LATENCY_SECONDS)
        return {"seconds": measured.seconds, "how": f"one image, random weights, {measured.how}"}

    # The ablations

    def ablation(self, name: str, cache: CachePolicy | None, about: dict) -> None:
        """Evaluate a policy, unless one of the table's rows has, and compare its images with the baseline's."""
        options, baseline = self.options(ABLATED_MODEL, cache), self.options(ABLATED_MODEL, None)
        images = self.ablation_images
        inputs = self.job.share(lambda: self.inputs(options, images=images, baseline=baseline.num_images))
        if self.job.share(lambda: self.is_finished(self.previous(name), inputs, options)):
            return
        if cache in METHODS.values():
            metrics = self.job.share(lambda: json.loads((options.output_dir / "metrics.json").read_text()))
        else:
            metrics = self.evaluate(options, f"{ABLATED_MODEL}, {about['ablation']}: {about['label']}")

        def finish() -> None:
            taken = ("sampling_seconds", "flops_per_image", "images_by_worker")
            numbers = {key: metrics.get(key) for key in taken}
            self.write(name, {**about, "inputs": inputs, **numbers, **self.comparison(options, baseline, images)})

        self.job.share(finish)

    def comparison(self, options: Options, baseline: Options, count: int) -> dict:
        """Scores of the first `count` images of a run, and their distance to the baseline's: each with its error."""
        reference = Statistics.load(options.statistics, FEATURES_DIMS[options.preset.features])
        features, logits, pixels = read_run(options, count)
        its_features, its_logits, its_pixels = read_run(baseline, count)
        distance = np.abs(pixels - its_pixels).mean(axis=(1, 2, 3))

        def measure(chosen: np.ndarray) -> list[float]:
            scores = score(features[chosen], logits[chosen], reference)
            its_scores = score(its_features[chosen], its_logits[chosen], reference)
            fid, its_fid, inception = (
                np.nan if number is None else number for number in (scores.fid, its_scores.fid, scores.is_mean)
            )
            return [fid, inception, fid - its_fid, distance[chosen].mean()]

        groups = groups_of_images(count, options.shape.class_num)
        names = ("fid", "inception_score", "fid_difference", "pixel_distance")
        spreads = dict(zip(names, jackknife(measure, groups)))
        notes = score(features, logits, reference).notes
        by_group = [float(distance[groups == group].mean()) for group in np.unique(groups)]
        return {"num_images": count, "notes": notes, "pixel_distance_by_group": by_group, **spreads}

    # Why it works

    def redundancy(self, model: str) -> None:
        options = self.options(model, None)

        def measure() -> None:
            inputs, name = self.inputs(options, images=REDUNDANCY_IMAGES), f"{model}-redundancy"
            previous = self.previous(name)
            if missing_file(options) or (previous and previous["inputs"] == inputs):
                return
            print(f"\n{model}: similarity between steps, over {REDUNDANCY_IMAGES} images", flush=True)
            network, _, _ = load_models(options, self.device, torch.float32)
            settings = {key: value for key, value in options.sampling.items() if key != "cache"}
            measured = measure_redundancy(network, num_images=REDUNDANCY_IMAGES, seed=options.seed, **settings)
            self.write(name, {"model": model, "inputs": inputs, **measured})

        self.job.share(measure)

    # All of it

    def run(self) -> None:
        rows = [(model, method) for model in PRESETS for method in METHODS]
        for model, method in rows:
            self.row(model, method)
        ablations = self.ablations()
        if ablations and not self.job.share(lambda: missing_file(self.options(ABLATED_MODEL, None))):
            self.ablation("ablation-baseline", None, {"ablation": None, "label": "baseline"})
            for number, (name, label, cache) in enumerate(ablations, start=1):
                self.job.print0(f"\nablation {number} of {len(ablations)}")
                self.ablation(f"ablation-{run_name(name, label)}", cache, {"ablation": name, "label": label})
        for model in self.args.models:
            self.redundancy(model)
        self.job.print0(f"\nresults are in {self.results.folder}; report.py makes a page of them")

    # What it would cost

    def dry_run(self) -> None:
        """Print what would be computed, and how long that would take; write nothing."""
        rates, total = {}, 0.0
        for model in self.args.models:
            for method, cache in METHODS.items():
                options = self.options(model, cache)
                seconds = self.describe(options, METHOD_NAMES[method])
                rates[model, method] = seconds / sum(map(sum, options.flops))
                total += seconds * options.num_images
        policies = {cache for *_, cache in self.ablations()} - set(METHODS.values())
        for cache in policies:
            options = self.options(ABLATED_MODEL, cache)
            per_operation = rates[ABLATED_MODEL, "lazymar"]
            total += per_operation * sum(map(sum, options.flops)) * options.num_images
        if policies:
            print(f"ablations: {len(policies)} further run(s) of {ABLATED_MODEL}, {self.ablation_images} images each")
        processes = self.job.world_size
        print(f"all together: about {duration(total / processes)} of sampling with {processes} process(es)")

    def describe(self, options: Options, method: str) -> float:
        """Print a row's plan, operations, memory and time. Returns the estimated seconds per image."""
        model, steps = options.shape, options.flops
        plan = make_plan(
            model.seq_len,
            model.buffer_size,
            num_iter=options.num_iter,
            cfg=options.cfg,
            cfg_schedule=options.cfg_schedule,
            policy=options.cache,
        )
        lazy = [step for step in plan if not step.refresh]
        steps_in_words = f"{len(plan)} steps: {len(plan) - len(lazy)} in full, {len(lazy)} lazy"
        if lazy:
            rows = model.buffer_size + model.seq_len
            steps_in_words += f" with {lazy[0].num_kept} at first and {lazy[-1].num_kept} at last of {rows} rows"
        weights, per_image = memory_needed(model, options.cfg, options.cache, self.dtype)
        parts = Flops.of_steps(steps)
        amounts = ", ".join(f"{part} {amount / 1e12:.3f}" for part, amount in parts._asdict().items())
        batch_size = options.eval_bsz if self.device.type == "cuda" else min(options.eval_bsz, 4)
        timed = time_sampling(
            random_model(options.model, self.device, self.dtype),
            batch_size,
            steps,
            **options.sampling,
            seconds=ESTIMATE_SECONDS,
        )
        seconds = timed.seconds / batch_size
        parameters = sum(parameter.numel() for parameter in model.parameters())
        missing = missing_file(options)
        lines = [
            f"{options.model}, {method}: {options.num_images:,} images in batches of {options.eval_bsz}",
            f"  plan        {steps_in_words}",
            f"  TFLOPs      {parts.total / 1e12:.3f} per image ({amounts})",
            f"  parameters  {parameters / 1e6:.1f} M",
            f"  memory      at least {(weights + per_image * options.eval_bsz) / 1e9:.3f} GB per process, "
            f"{weights / 1e9:.3f} of it for weights",
            f"  time        {seconds:.3f} s per image, {duration(seconds * options.num_images)} for one process "
            f"(a batch of {batch_size}, random weights, {timed.how}; without decoding and scoring)",
        ]
        print("\n".join([*lines, *([f"  cannot run  {missing}"] if missing else [])]), flush=True)
        return seconds


@lru_cache
def _digest(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


def missing_file(options: Options) -> str | None:
    """Which file an evaluation lacks, in words; None if it lacks nothing."""
    files = {"weights": options.resume, "VAE": options.vae_path, "statistics": options.statistics}
    for what, path in files.items():
        if not path.exists():
            return f"{what} missing: {path}"
    if options.preset.features == "inception":
        try:
            load_extractor("inception", options.inception_weights)
        except InputError as error:
            return str(error)
    return None


def run_folder(options: Options) -> RunFolder:
    """A run that is finished, or whose files are to be looked at."""
    size = options.shape.img_size
    return RunFolder(options.output_dir, options.num_images, options.eval_bsz, size, None, lambda index: True)


def read_run(options: Options, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features [N, F], logits [N, K] and pixels [N, H, W, 3] float32 of a finished run's first images."""
    run = run_folder(options)
    batches = [run.read(number) for number in run.batch_numbers()]
    features, logits = (
        torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches])[:count])
        for name in ("features", "logits")
    )
    return features, logits, np.stack([run.read_image(index) for index in range(count)]).astype(np.float32)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be asked for."""
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    parser.add("--models", str, "models to run", nargs="+", default=list(PRESETS), choices=PRESETS, metavar="MODEL")
    parser.add("--num_images", int, "images for each row of the table", minimum=1,
               default_text=f"50000, and 2000 of {ABLATED_MODEL}")  # fmt: skip
    parser.add("--eval_bsz", int, "batch size: images that each process samples at a time", minimum=1,
               default_text=f"128, and 25 of {ABLATED_MODEL}")  # fmt: skip
    parser.add_fields(Options, "num_iter", "num_sampling_steps", "seed", "device", "dtype", "inception_weights")
    parser.add("--ablations", str, f"ablations of {ABLATED_MODEL}: all, none, or some of {', '.join(ABLATIONS)}",
               nargs="+", default=["all"], metavar="ABLATION")  # fmt: skip
    parser.add("--ablation_images", int, "images of each ablation, from the table's rows", minimum=1,
               default_text=f"{ABLATION_IMAGES}, or as many as there are")  # fmt: skip
    parser.add("--output_dir", Path, "folder of runs and results", default=Path("output/reproduce"), metavar="FOLDER")
    parser.add("--overwrite", bool, "make again what was made with other settings")
    parser.add("--dry_run", bool, "print the plan, FLOPs, memory and an estimate of the time, and write nothing")
    args = parser.parse_args(arguments)
    choose_ablations(args.ablations)
    args.models = [model for model in PRESETS if model in args.models]
    return args


def main(job: Job) -> None:
    reproduce(job, parse_args(None))


def reproduce(job: Job, args: argparse.Namespace) -> None:
    device = machine.choose_device(args.device, job.local_rank)
    reproduction = Reproduction(job, args, device, machine.choose_dtype(args.dtype, device))
    if reproduction.ablations():
        reproduction.ablation_images  # noqa: B018, is out of range before long work rather than after
    if args.dry_run:
        job.share(reproduction.dry_run)
    else:
        reproduction.run()


if __name__ == "__main__":
    sys.exit(launch(main))
