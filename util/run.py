"""A run of `eval.py`: how it is opened, what its steps share, and how it is saved and finished."""

import contextlib
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from models import MAR, AutoencoderKL
from util import machine
from util.errors import InputError
from util.extractors import FEATURES_DIMS, Extractor, load_extractor
from util.files import atomic_write, file_digest
from util.folder import Batch, RunFolder, check_folder, open_folder
from util.images import encode_png, image_grid
from util.machine import out_of_memory_explained
from util.metrics import Statistics, needs_dinov2, score, score_table
from util.options import Options, describe_method
from util.processes import GO_ON, Job
from util.weights import find_weights, load_model

GRID_IMAGES = 80  # in grid.png: 8 of each class where there are 10
WRITERS = 4  # batches that are written in the background
VISIBLE_SECONDS = 90  # until a network drive shows on one machine what another has written


@dataclass
class Run:
    """A run that has been opened. `settings` and `environment` are those of `run.json` and of this session."""

    job: Job
    options: Options
    settings: dict[str, Any]
    environment: dict[str, Any]
    folder: RunFolder
    missing: list[int]  # the numbers of the images that are to be made
    networks: tuple[MAR, AutoencoderKL]
    extractor: Extractor | None  # None: no scores are wanted
    reference: Statistics | None

    @property
    def cuda_graphs(self) -> bool:
        """Whether to capture graphs: each rank captures them in its second batch, so they pay from the third on."""
        full_batches = len(self.missing) // self.options.eval_bsz
        return self.options.cuda_graphs and full_batches >= 3 * self.job.world_size

    def claim(self) -> Iterator[Batch]:
        """Yield this rank's share of the batches that are to be made."""
        size = self.options.eval_bsz
        for start in self.job.claim(range(0, len(self.missing), size)):
            yield Batch(self.missing[start : start + size])

    def save(self, batches: Iterable[Batch]) -> None:
        """Write batches in the background, show how many images all ranks have made, and wait for all ranks.

        If `batches` raises `Stopped`, all batches that it has yielded are written first.
        """
        total = len(self.folder.labels)
        there = total - len(self.missing)
        writing = deque[Any]()
        bar = tqdm(total=total, initial=there, disable=self.job.rank > 0, unit="image", miniters=1, smoothing=0)
        with bar, ThreadPoolExecutor(WRITERS) as pool:
            for batch in batches:
                writing.append(pool.submit(self.folder.save, batch))
                if len(writing) > WRITERS:
                    writing.popleft().result()
                bar.update(there + self.job.count(len(batch.indices)) - bar.n)
            for written in writing:
                written.result()
            self.job.barrier()
            bar.update(total - bar.n)

    def finish(self) -> dict[str, Any]:
        """Score all images, write `metrics.json` and `grid.png`, print a table; return the metrics, on all ranks."""
        return self.job.share(self._finish)

    def _finish(self) -> dict[str, Any]:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while lost := self.folder.missing():
            if time.monotonic() > deadline:
                raise InputError(f"{self.folder.path} has lost images {lost[:9]}; {GO_ON}")
            time.sleep(1)
        options, flops, seconds = self.options, self.options.flops, self.folder.seconds()
        method = describe_method(options.method_name, options.method)
        metrics = {"num_images": options.num_images, "method": method, "flops_per_image": flops.total}
        metrics |= {"flops_by_part": flops._asdict(), **seconds, **self._scores()}
        metrics |= {"settings": self.settings, "environment": self.environment}
        shown = list(range(min(GRID_IMAGES, options.num_images)))
        if options.class_labels is None:
            shown.sort(key=lambda index: self.folder.labels[index])
        self.folder.write("grid.png", encode_png(image_grid([self.folder.read_image(index) for index in shown])))
        self.folder.write("metrics.json", json.dumps(metrics, indent=2).encode())
        print(f"images           {options.num_images:,} of {options.model}, method {method}")
        if self.extractor:
            print(score_table(metrics, self.extractor.name))
        print("s per image      {seconds_per_image:.3f} (sampling {sampling_seconds:.3f})".format(**seconds))
        print(f"TFLOPs per image {flops.total / 1e12:.4g}\nwritten to       {self.folder.path}", flush=True)
        return metrics

    def _scores(self) -> dict[str, Any]:
        """Return the scores of all images, and what they compare with; nothing if no scores are wanted."""
        if self.extractor is None or self.reference is None:
            return {}
        scores = score(
            self.folder.outputs(),
            self.reference,
            self.options.metrics,
            labels=self.folder.labels,
            standard_errors=self.options.standard_errors,
        )
        path = self.options.statistics
        return {
            **scores,
            "features": self.extractor.name,
            "reference": {"path": str(path), "sha256": file_digest(path)},
        }


@contextlib.contextmanager
def open_run(job: Job, options: Options) -> Iterator[Run]:
    """Open the folder of a run once all is checked that can be checked before long work, and hold its lock.

    Too little memory ends the block with an `InputError` that names the way out.

    Raises:
        InputError: the run cannot be made or continued as it was asked for.
    """
    device = machine.choose_device(options.device, job.local_rank)
    dtype = machine.choose_dtype(options.dtype, device)
    job.print0(machine.introduce(device, dtype, job.world_size, asked=(options.device, options.dtype)))
    weights = {"the VAE": options.vae_path, options.model: options.resume}
    weights = {what: find_weights(path, what) for what, path in weights.items()}
    batch_size = min(options.eval_bsz, options.num_images)
    settings = options.settings(device, dtype)
    environment = {"eval_bsz": options.eval_bsz, **machine.describe(device)}
    check_folder(options.output_dir, settings, options.overwrite)  # before the work that digests and networks take
    reference, extractor = None, None
    if options.score:
        features, with_dinov2 = options.preset.features, needs_dinov2(options.metrics)
        reference = Statistics.load(options.statistics, FEATURES_DIMS[features], options.metrics)
        load = partial(load_extractor, features, options.inception_weights, device, with_dinov2=with_dinov2)
        extractor = job.in_turn(load)
    settings["scored by"] = extractor.identity if extractor else None
    settings |= job.share(lambda: {f"sha256 of {what}": file_digest(file) for what, file in weights.items()})
    with contextlib.ExitStack() as stack:
        stack.enter_context(out_of_memory_explained(batch_size))
        paths = {"weights": options.resume, "vae_weights": options.vae_path}  # before --overwrite: they may not fit
        networks = load_model(options.model, device, dtype, class_num=options.class_num, **paths)
        if job.rank == 0:
            overwrite = options.overwrite
            stack.enter_context(open_folder(options.output_dir, settings, environment, overwrite=overwrite))
        num_saved = options.num_images if options.save_images else GRID_IMAGES
        folder = RunFolder(options.output_dir, options.labels(), num_saved)
        missing = job.share(folder.missing)
        run = Run(job, options, settings, environment, folder, missing, networks, extractor, reference)
        there = options.num_images - len(missing)
        job.print0(f"{folder.path}: {there:,} of {options.num_images:,} images are there")
        if options.class_labels is None and options.num_images % options.class_num:
            job.print0(f"note: {options.num_images:,} images are not a multiple of {options.class_num} classes")
        if options.score and options.num_images < 5 * FEATURES_DIMS[options.preset.features]:  # a poor covariance
            job.print0(
                f"note: the FID of so few images, {options.num_images:,}, is far too high: compare only such runs"
            )
        yield run


def evaluate_sweep(job: Job, options: Options, evaluate: Callable[[Job, Options], dict]) -> dict[str, Any]:
    """Evaluate each run of a sweep, in a folder of its own, where it goes on if it was cut off.

    `cfgs.json` holds a summary: mean and standard deviation over the seeds of each CFG scale.

    Raises:
        InputError: as `evaluate`; or one of the folders holds a run with other settings.
    """
    device = machine.choose_device(options.device, job.local_rank)
    dtype = machine.choose_dtype(options.dtype, device)
    for run in options.sweep:  # all of them, before the first one takes its time
        check_folder(run.output_dir, run.settings(device, dtype), options.overwrite)
    summary, table = summarise_sweep(options.sweep, [evaluate(job, run) for run in options.sweep])
    if job.rank == 0:
        with atomic_write(options.output_dir / "cfgs.json") as partial:
            partial.write_text(json.dumps(summary, indent=2))
    job.print0(f"\n{table}\nwritten to {options.output_dir / 'cfgs.json'}")
    return summary


def summarise_sweep(runs: Sequence[Options], metrics: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return mean and sample standard deviation over the seeds of each CFG scale, and a table of them."""
    names = [name for name, value in metrics[0].items() if isinstance(value, float) and not name.endswith("_std")]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    summaries, rows = [], {name: f"{name:30s}" for name in ("cfg", *names)}
    for cfg in dict.fromkeys(run.cfg for run in runs):
        values = {name: [each[name] for run, each in zip(runs, metrics) if run.cfg == cfg] for name in names}
        mean = {name: statistics.mean(each) for name, each in values.items()}
        std = {name: statistics.stdev(each) for name, each in values.items() if len(each) > 1}
        summaries.append({"cfg": cfg, "mean": mean, "std": std})
        rows["cfg"] += f"{cfg:>20.15g}"
        for name in names:
            cell = f"{mean[name]:.4g}" + (f" ± {std[name]:.2g}" if std else "")
            rows[name] += f"{cell:>20s}"
    title = f"seeds {', '.join(map(str, seeds))}, {runs[0].num_images:,} images each: mean ± standard deviation"
    return {"seeds": seeds, "num_images": runs[0].num_images, "cfgs": summaries}, "\n".join([title, *rows.values()])
