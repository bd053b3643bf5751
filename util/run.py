"""A run of `eval.py`: how it is opened, what its steps share, and how it is saved and finished."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.lazymar.flops import Flops
from models.lazymar.sampler import SampledStep
from util import machine
from util.errors import InputError
from util.extractors import FEATURES_DIMS, Extractor, load_extractor
from util.files import atomic_write, file_digest
from util.folder import Batch, RunFolder, check_folder, locked, open_folder
from util.images import encode_png, image_grid
from util.memory import check_memory, out_of_memory_explained
from util.metrics import Statistics, need_dinov2, score, score_table
from util.options import Options, describe_method
from util.processes import Job, command_line
from util.weights import find_weights

GRID_IMAGES = 80  # in grid.png: 8 of each class where there are 10
WRITERS = 4  # batches that are written in the background
STEPS_AHEAD = 8  # steps in a GPU's queue: enough to keep it busy, few enough for progress and signals
LINE_SECONDS = 30  # between two lines of progress where there is no terminal
VISIBLE_SECONDS = 90  # until a network drive shows on one machine what another has written
PROGRESS = "{percentage:3.0f}%|{bar:20}| {n:,.1f} of {total:,} images [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass
class Run:
    """A run that has been opened. `settings` and `environment` are those of `run.json` and of this session."""

    job: Job
    options: Options
    device: torch.device
    dtype: torch.dtype
    settings: dict[str, Any]
    environment: dict[str, Any]
    folder: RunFolder
    unfinished: list[list[int]]  # the numbers of the images of each batch that is to be made
    extractor: Extractor | None  # None: no scores are wanted
    reference: Statistics | None
    bar: tqdm = field(init=False)  # on rank 0

    @property
    def done(self) -> int:
        """The number of images that were there when the run was opened."""
        return len(self.folder.labels) - sum(map(len, self.unfinished))

    @property
    def cuda_graphs(self) -> bool:
        """Whether to capture graphs: each rank captures them in its second batch, so they pay from the third on."""
        full_batches = sum(len(indices) == self.options.eval_bsz for indices in self.unfinished)
        return self.options.cuda_graphs and full_batches >= 3 * self.job.world_size

    def claim(self) -> Iterator[Batch]:
        """Yield this rank's share of the unfinished batches, with their pixels where only the record was lost."""
        for indices in self.job.claim(self.unfinished):
            batch = self.folder.resume(indices)
            if batch.pixels is not None:
                self.count(1000 * len(indices))
            yield batch

    def follow(self, batch: Batch) -> Callable[[SampledStep], None]:
        """Return a function that counts each sampling step of a batch by its share of the FLOPs."""
        flops = list(accumulate(step.total for step in self.options.flops))
        queue, counted = deque[torch.cuda.Event](), 0

        def on_step(sampled: SampledStep) -> None:
            nonlocal counted
            if self.device.type == "cuda":
                queue.append(torch.cuda.Event(blocking=True))
                queue[-1].record()
                if len(queue) > STEPS_AHEAD:
                    queue.popleft().synchronize()
            done = 1000 * len(batch.indices) * flops[sampled.step.index] // flops[-1]
            self.count(done - counted)
            counted = done

        return on_step

    def count(self, thousandths: int) -> None:
        """Count thousandths of images as done, and show what all ranks have done."""
        self.bar.update(self.done + self.job.count(thousandths) / 1000 - self.bar.n)

    def save(self, batches: Iterable[Batch]) -> None:
        """Write batches in the background, and wait for all ranks.

        Raises `Stopped`, once all finished batches are written, if a signal has ended `batches` early.
        """
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=len(self.folder.labels),
            initial=self.done,
            disable=self.job.rank > 0,
            bar_format=PROGRESS if is_terminal else PROGRESS + "\n",
            mininterval=0.1 if is_terminal else LINE_SECONDS,
            miniters=0,
            smoothing=0,  # the mean rate: batches of all ranks come in bursts
            unit="image",
        )
        with self.bar, ThreadPoolExecutor(WRITERS) as pool:
            writing = deque[Any]()
            for batch in batches:
                writing.append(pool.submit(self.folder.save, batch))
                if len(writing) > WRITERS:
                    writing.popleft().result()
            for written in writing:
                written.result()
            self.job.check()
            self.job.barrier(while_waiting=lambda: self.count(0))

    def finish(self) -> dict[str, Any]:
        """Score all images, write `metrics.json` and `grid.png`, print a table; return the metrics, on all ranks."""
        return self.job.share(self._finish)

    def _finish(self) -> dict[str, Any]:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while lost := self.folder.missing():
            if time.monotonic() > deadline:
                raise InputError(f"{self.folder.path} has lost images {lost[:9]}; this goes on: {command_line()}")
            time.sleep(1)
        options, flops = self.options, Flops.of_steps(self.options.flops)
        method = describe_method(options.method_name, options.method)
        metrics = {"num_images": options.num_images, "method": method, "flops_per_image": flops.total}
        metrics["flops_by_part"] = flops._asdict()
        table = [f"images           {options.num_images:,} of {options.model}, method {method}"]
        if self.extractor is not None and self.reference is not None:
            outputs = {name: torch.from_numpy(self.folder.outputs(name)) for name in self.folder.wanted}
            scores = score(
                outputs,
                self.reference,
                options.metrics,
                labels=self.folder.labels,
                standard_errors=options.standard_errors,
                progress=True,
            )
            metrics.update(scores, features=self.extractor.name)
            metrics["reference"] = {"path": str(options.statistics), "sha256": file_digest(options.statistics)}
            table.append(score_table(scores, self.extractor.name))
        if seconds := self.folder.seconds():
            metrics.update(seconds)
            table.append("s per image      {seconds_per_image:.3f} (sampling {sampling_seconds:.3f})".format(**seconds))
        table.append(f"TFLOPs per image {flops.total / 1e12:.4g}\nwritten to       {self.folder.path}")
        print("\n".join(table), flush=True)
        shown = list(range(min(GRID_IMAGES, options.num_images)))
        if options.class_labels is None:
            shown.sort(key=lambda index: self.folder.labels[index])
        self.folder.write("grid.png", encode_png(image_grid([self.folder.read_image(index) for index in shown])))
        metrics.update(settings=self.settings, environment=self.environment)
        self.folder.write("metrics.json", json.dumps(metrics, indent=2).encode())
        return metrics


@contextlib.contextmanager
def open_run(job: Job, options: Options) -> Iterator[Run]:
    """Open the folder of a run once all is checked that can be checked before long work, and hold its lock.

    A full disk and too little memory end the block with an `InputError` that names the way out.

    Raises:
        InputError: the run cannot be made or continued as it was asked for.
    """
    device = machine.choose_device(options.device, job.local_rank)
    dtype = machine.choose_dtype(options.dtype, device)
    job.print0(machine.introduce(device, dtype, job.world_size, asked=(options.device, options.dtype)))
    features, reference, extractor = options.preset.features, None, None
    if options.score:
        reference = Statistics.load(options.statistics, FEATURES_DIMS[features], options.metrics)
    weights = {"the VAE": options.vae_path, options.model: options.resume}
    weights = {what: find_weights(path, what) for what, path in weights.items()}
    batch_size = min(options.eval_bsz, options.num_images)
    if note := check_memory(options.meta_model, options.plan, batch_size, dtype, device, options.cuda_graphs):
        job.print0(note)
    environment = {"eval_bsz": options.eval_bsz, **machine.describe(device)}

    def open_and_describe() -> dict[str, Any]:
        settings = options.settings(device, dtype)
        if not options.overwrite:
            check_folder(options.output_dir, settings)  # before the work that digests take
        settings.update({f"sha256 of {what}": file_digest(file) for what, file in weights.items()})
        open_folder(options.output_dir, settings, environment, overwrite=options.overwrite)
        return settings

    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_faults_explained(options.output_dir))
        if job.rank == 0:
            stack.enter_context(locked(options.output_dir))
        settings = job.share(open_and_describe)
        if options.score:
            arguments = features, options.inception_weights, device
            with_dinov2 = need_dinov2(options.metrics)
            extractor = job.in_turn(lambda: load_extractor(*arguments, with_dinov2=with_dinov2))
        num_saved = options.num_images if options.save_images else GRID_IMAGES
        wanted = extractor.identity if extractor else {}
        folder = RunFolder(options.output_dir, options.labels(), num_saved, wanted)
        unfinished = job.share(lambda: folder.unfinished(options.eval_bsz))
        run = Run(job, options, device, dtype, settings, environment, folder, unfinished, extractor, reference)
        job.print0(f"{folder.path}: {run.done:,} of {options.num_images:,} images are there")
        if options.class_labels is None and options.num_images % options.class_num:
            job.print0(f"note: {options.num_images:,} images are not a multiple of {options.class_num} classes")
        stack.enter_context(out_of_memory_explained(batch_size))
        yield run


def evaluate_sweep(job: Job, options: Options, evaluate: Callable[[Job, Options], dict]) -> dict[str, Any]:
    """Evaluate each run of a sweep, in a folder of its own, and write mean and spread over the seeds of each CFG scale.

    `seeds.json`, or `cfgs.json` for several scales, holds the summary. Each run goes on where it was cut off.

    Raises:
        InputError: as `evaluate`; or the folder holds a single run.
    """
    folder, device = options.output_dir, machine.choose_device(options.device, job.local_rank)

    def check_folders() -> None:
        if (folder / "run.json").exists():
            raise InputError(f"--output_dir {folder} holds a single run: choose another folder for several")
        for run in options.sweep if not options.overwrite else ():
            check_folder(run.output_dir, run.settings(device, machine.choose_dtype(options.dtype, device)))

    def summarise() -> dict[str, Any]:
        summary, table = summarise_sweep(options.sweep, metrics)
        file = folder / ("cfgs.json" if "cfgs" in summary else "seeds.json")
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(summary, indent=2))
        print(f"\n{table}\nwritten to {file}", flush=True)
        return summary

    job.share(check_folders)
    metrics = [evaluate(job, run) for run in options.sweep]
    with disk_faults_explained(folder):
        return job.share(summarise)


def summarise_sweep(runs: Sequence[Options], metrics: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return mean and spread (sample standard deviation) over the seeds of each CFG scale, and a table of them."""
    names = [name for name, value in metrics[0].items() if isinstance(value, float) and not name.endswith("_std")]
    names = [name for name in names if all(name in each for each in metrics)]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    summaries, rows = [], {name: f"{name:30s}" for name in ("cfg", *names)}
    for cfg in dict.fromkeys(run.cfg for run in runs):
        own = [each for run, each in zip(runs, metrics) if run.cfg == cfg]
        mean = {name: float(np.mean([each[name] for each in own])) for name in names}
        spread = {name: float(np.std([each[name] for each in own], ddof=1)) for name in names if len(own) > 1}
        summaries.append({"cfg": cfg, "seeds": seeds, "num_images": runs[0].num_images, "mean": mean, "spread": spread})
        rows["cfg"] += f"{cfg:>20g}"
        for name in names:
            cell = f"{mean[name]:.4g}" + (f" ± {spread[name]:.2g}" if spread else "")
            rows[name] += f"{cell:>20s}"
    title = f"seeds {', '.join(map(str, seeds))}, {runs[0].num_images:,} images each: mean ± standard deviation"
    return (summaries[0] if len(summaries) == 1 else {"cfgs": summaries}), "\n".join([title, *rows.values()])


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
