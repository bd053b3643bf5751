"""A run of `eval.py`: how it is opened, what its steps share, and how it is saved and finished."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from util import machine
from util.errors import InputError
from util.files import atomic_write, file_digest
from util.job.processes import Job
from util.job.progress import Progress, StepProgress
from util.job.watch import command_line, nothing
from util.job.writers import Writers
from util.runs.folder import Batch, RunFolder, check_folder, open_folder
from util.runs.images import encode_png, image_grid
from util.runs.memory import check_memory, out_of_memory_explained
from util.runs.metrics import summarise, summarise_seeds
from util.runs.options import CheckedOptions, Options, check
from util.scoring.scores import DINOV2, FEATURES_DIMS, Extractor, Statistics, load_extractor
from util.weights.checkpoint import find_weights

GRID_IMAGES = 80  # in grid.png: 8 of each class where there are 10
VISIBLE_SECONDS = 90  # until a network drive shows on one machine what another has written


@dataclass(frozen=True)
class Run:
    """A run that has been opened. `settings` are those in `run.json`."""

    job: Job
    options: CheckedOptions
    device: torch.device
    dtype: torch.dtype
    settings: dict
    folder: RunFolder
    unfinished: list[int]  # numbers of the batches that are to be made
    extractor: Extractor | None  # None: no scores are wanted
    reference: Statistics | None

    def claim(self) -> Iterator[Batch]:
        """Hand this rank one unfinished batch after another, each with its pixels if only its record was lost."""
        for number in self.job.claim(self.unfinished):
            batch = self.folder.resume(number)
            if batch.pixels is None:
                batch.worker = machine.where(self.device)
            yield batch

    def follow(self, batch: Batch) -> StepProgress:
        """Count the sampling steps of a batch as progress: the result is to be called with each step."""
        steps = StepProgress(len(batch.indices), [step.total for step in self.options.flops], self.device)
        self.job.watch.under_way = steps.images
        return steps

    def save(self, batches: Iterable[Batch]) -> None:
        """Write batches in the background as they come, and show the progress of all ranks.

        Returns when all ranks are through. Raises `Stopped` if a signal has ended `batches` early, once what was in
        flight is safe.
        """
        job, start = self.job, time.perf_counter()
        done = self.folder.num_images - self.folder.count_images(self.unfinished)
        job.watch.done = 0  # the job may have finished other runs before

        def write(batch: Batch) -> None:
            self.folder.save(batch)
            job.watch.count(len(batch.indices))

        with Progress(self.folder.num_images, done, enabled=job.rank == 0) as progress, Writers() as writers:
            job.watch.on_tick = lambda: progress.update(done + job.watch.all_done())
            for batch in batches:
                job.watch.under_way = nothing
                writers.submit(write, batch)
            writers.flush()
            print(f"rank {job.rank}: {job.watch.done:,} images in {time.perf_counter() - start:.0f} s", flush=True)
            job.check_stop()
            job.gather(None)  # a barrier: until the last rank is through
            progress.update(self.folder.num_images)

    def finish(self) -> dict:
        """Score all images, write `metrics.json` and `grid.png`, print a table; return the metrics, on all ranks."""

        def finish() -> dict:
            self._wait_for_files()
            batches = [self.folder.read(number) for number in self.folder.batch_numbers()]
            metrics, table = summarise(batches, self.options, self.reference, self.extractor)
            metrics.update(settings=self.settings, environment=machine.describe(self.device))
            print(f"{table}\nwritten to       {self.folder.path}", flush=True)
            self._write_grid()
            self.folder.write("metrics.json", json.dumps(metrics, indent=2).encode())
            return metrics

        with disk_faults_explained(self.folder.path):
            return self.job.share(finish)

    @contextlib.contextmanager
    def faults_explained(self) -> Iterator[None]:
        """Turn a full disk and too little memory into an `InputError` that names the way out."""
        with disk_faults_explained(self.folder.path), out_of_memory_explained(self.options.eval_bsz):
            yield

    def _wait_for_files(self) -> None:
        """Wait until this machine sees what others have written. Raises InputError if batches do not appear."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while lost := self.folder.unfinished():
            if time.monotonic() > deadline:
                raise InputError(
                    f"{self.folder.path} has lost the batches {lost}; this makes them again: {command_line()}"
                )
            time.sleep(1)

    def _write_grid(self) -> None:
        """Write `grid.png`: the first images, by class, or all the chosen ones as they were asked for."""
        shown = list(range(min(GRID_IMAGES, self.folder.num_images)))
        if self.options.class_labels is None:
            shown.sort(key=lambda index: self.folder.labels[index])
        self.folder.write("grid.png", encode_png(image_grid([self.folder.read_image(index) for index in shown])))


def evaluate_seeds(job: Job, given: Options, evaluate: Callable[[Job, Options], dict]) -> dict:
    """Evaluate the same settings with several seeds, each in a folder of its own, and write mean and spread.

    The runs are in `seed-0`, `seed-1` and so on of `--output_dir`, by default that of a single run with "-seeds" at its
    end; `seeds.json` beside them holds the summary. Each run goes on where it was cut off.

    Raises:
        InputError: as `evaluate`; or the folder holds the run of a single seed.
    """
    options = check(given)
    folder = given.output_dir or options.output_dir.with_name(f"{options.output_dir.name}-seeds")
    runs = {
        seed: dataclasses.replace(given, seed=seed, more_seeds=(), output_dir=folder / f"seed-{seed}")
        for seed in (given.seed, *given.more_seeds)
    }

    def check_folders() -> None:
        if (folder / "run.json").exists():
            raise InputError(f"--output_dir {folder} holds the run of a single seed: choose another folder for several")
        device = machine.choose_device(given.device, job.local_rank)
        for seed, run in runs.items():
            if not given.overwrite:
                settings = check(run).settings(device, machine.choose_dtype(given.dtype, device))
                check_folder(folder / f"seed-{seed}", settings)

    job.share(check_folders)
    metrics = {seed: evaluate(job, run) for seed, run in runs.items()}

    def write() -> dict:
        summary, table = summarise_seeds(metrics)
        with atomic_write(folder / "seeds.json") as partial:
            partial.write_text(json.dumps(summary, indent=2))
        print(f"\n{table}\nwritten to {folder / 'seeds.json'}", flush=True)
        return summary

    with disk_faults_explained(folder):
        return job.share(write)


def open_run(job: Job, given: Options) -> Run:
    """Open the folder of a run, once all is checked that can be checked before long work.

    First come options, files and settings that are known without work, then digests of the weights, then the network
    that scores images, which may have to be downloaded.

    Raises:
        InputError: the run cannot be made or continued as it was asked for.
    """
    options = check(given)
    device = machine.choose_device(options.device, job.local_rank)
    dtype = machine.choose_dtype(options.dtype, device)
    if device.type == "cpu" and dtype.itemsize == 2 and not machine.cpu_computes_in_bfloat16():
        job.print0(f"note: this processor does not compute in {options.dtype}: --dtype float32 is many times faster")
    features = options.preset.features
    reference = None
    if options.score:
        reference = Statistics.load(options.statistics, FEATURES_DIMS[features], options.metrics)
    weights = find_all_weights(options)
    check_memory(options.meta_model, options.plan, options.eval_bsz, dtype, device)

    with disk_faults_explained(options.output_dir):
        settings = job.share(
            lambda: open_folder(
                options.output_dir,
                options.settings(device, dtype),
                machine.describe(device),
                digests=lambda: weights_digests(weights),
                overwrite=options.overwrite,
            )
        )
    extractor = None
    if options.score:  # rank 0 goes first: it may have to download the weights
        with_dinov2 = options.metrics.fd_dinov2
        extractor = job.in_turn(
            lambda: load_extractor(features, options.inception_weights, device, with_dinov2=with_dinov2)
        )
    folder = run_folder(options, extractor)

    def find_work() -> list[int]:
        unfinished = folder.unfinished()
        folder.check_disk(unfinished)
        return unfinished

    with disk_faults_explained(options.output_dir):
        unfinished = job.share(find_work)
    done = folder.num_images - folder.count_images(unfinished)
    job.print0(f"{folder.path}: {done:,} of {folder.num_images:,} images are there")
    if options.class_labels is None and options.num_images % options.meta_model.class_num:
        job.print0(f"note: {options.num_images:,} images are not a multiple of {options.meta_model.class_num} classes")
    return Run(job, options, device, dtype, settings, folder, unfinished, extractor, reference)


def find_all_weights(options: CheckedOptions) -> dict[str, Path]:
    """Find the files of a run's weights, by what they are of. Raises InputError if one is missing."""
    paths = {options.model: options.resume, "the VAE": options.vae_path}
    return {what: find_weights(path, what) for what, path in paths.items()}


def weights_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Compute the settings of a run that take work: digests of the files of its weights, by what they are of."""
    return {f"sha256 of {what}": file_digest(file) for what, file in files.items()}


def run_folder(options: CheckedOptions, extractor: Extractor | None = None) -> RunFolder:
    """The folder of a run, given its options and the extractor that its features must come from, if any."""
    scored_by = dinov2 = None
    if extractor is not None:
        scored_by = f"{extractor.name} {machine.weights_digest(extractor.network)}"
        if extractor.dinov2 is not None:
            dinov2 = f"{DINOV2} {machine.weights_digest(extractor.dinov2)}"
    return RunFolder(
        path=options.output_dir,
        labels=options.labels(),
        batch_size=options.eval_bsz,
        image_size=options.meta_model.img_size,
        extractor=scored_by,
        dinov2=dinov2,
        saved=lambda index: options.save_images or index < GRID_IMAGES,
    )


@contextlib.contextmanager
def disk_faults_explained(folder: Path) -> Iterator[None]:
    """Turn an OSError into an `InputError` that names the file and the command that goes on."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {error.filename or folder}: {error.strerror}; nothing written before is damaged, and "
            f"once that is put right, this goes on: {command_line()}"
        ) from error
