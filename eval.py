"""Generate images with MAR or LazyMAR, and score them: FID, Inception Score, seconds and FLOPs per image.

    torchrun --nproc_per_node=2 eval.py --num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar
    python eval.py --model mar_tiny --num_images 2000 --eval_bsz 100

The same command continues a run that was cut off, on any number of processes; `--help` lists the flags.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from models import (
    MAR,
    PRESETS,
    AutoencoderKL,
    ImageNoise,
    Sampler,
    cast_model,
    create_model,
    pack_linear_layers,
)
from models.lazymar.flops import Flops
from models.vae import for_inference
from util import machine
from util.errors import InputError
from util.job.processes import Job, launch
from util.job.progress import Progress, StepProgress
from util.job.threads import Writers, map_images
from util.job.watch import command_line, nothing
from util.runs.folder import Batch, RunFolder, prepare
from util.runs.images import contact_sheet, decode, encode_png, to_uint8
from util.runs.memory import check_memory, out_of_memory_explained
from util.runs.options import Options, check, parse_options
from util.scoring.scores import FEATURES_DIMS, Extractor, Statistics, load_extractor, score
from util.weights.checkpoint import LoadedWeights, load_weights

SHEET_IMAGES = 80  # on the contact sheet: 8 of each class where there are 10
VISIBLE_SECONDS = 90  # until a network drive shows on one machine what another has written


def evaluate(job: Job, options: Options) -> dict:
    """Generate those of a run's images that are missing, and score all of them.

    Returns what `metrics.json` holds, on all ranks.

    Raises:
        InputError: something that the user can put right.
    """
    # What can go wrong goes wrong before long work.
    options = check(options)
    device = machine.choose_device(options.device, job.local_rank)
    dtype = machine.choose_dtype(options.dtype, device)
    if device.type == "cpu" and dtype.itemsize == 2 and not machine.cpu_computes_in_bfloat16():
        job.print0(f"note: this processor does not compute in {options.dtype}: --dtype float32 is many times faster")
    settings = options.settings(device, dtype)
    kind = options.preset.features
    reference = Statistics.load(options.statistics, FEATURES_DIMS[kind]) if options.score else None
    job.share(lambda: prepare(options.output_dir, settings, overwrite=options.overwrite))
    check_memory(options.shape, options.eval_bsz, options.cfg, options.cache, dtype, device)
    model, vae, weights = load_models(options, device, dtype)
    extractor = None
    if options.score:  # rank 0 goes first: it may have to download the weights
        extractor = job.in_turn(lambda: load_extractor(kind, options.inception_weights, device))
    run = RunFolder(
        path=options.output_dir,
        num_images=options.num_images,
        batch_size=options.eval_bsz,
        image_size=options.shape.img_size,
        extractor=extractor and f"{kind} {machine.weights_digest(extractor.network)}",
        saved=lambda index: options.save_images or index < SHEET_IMAGES,
    )

    def begin() -> list[int]:
        settings.update({f"sha256 of {name}": loaded.sha256() for name, loaded in weights.items()})
        prepare(options.output_dir, settings)
        return run.begin(settings, machine.describe(device))

    def finish() -> dict:
        metrics = summarise(run, options, reference, extractor)
        metrics.update(settings=settings, environment=machine.describe(device))
        write_sheet(run, options)
        run.write("metrics.json", json.dumps(metrics, indent=2).encode())
        return metrics

    with disk_faults_explained(run.path):
        unfinished = job.share(begin)
        done = run.num_images - sum(len(run.indices(number)) for number in unfinished)
        job.print0(f"{run.path}: {done:,} of {run.num_images:,} images are there")
        if options.class_labels is None and options.num_images % options.shape.class_num:
            job.print0(f"note: {options.num_images:,} images are not a multiple of {options.shape.class_num} classes")
        batches = generate(job, unfinished, run, model, vae, options)
        save(job, add_features(batches, extractor), run, done)
        return job.share(finish)


@contextlib.contextmanager
def disk_faults_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {error.filename or folder}: {error.strerror}; nothing written before is damaged, and "
            f"once that is put right, this goes on: {command_line()}"
        ) from error


def load_models(
    options: Options, device: torch.device, dtype: torch.dtype
) -> tuple[MAR, AutoencoderKL, dict[str, LoadedWeights]]:
    """MAR and its VAE, ready for use in `dtype`, and where their weights came from."""
    with torch.device("meta"):
        model, vae = create_model(options.model), AutoencoderKL(**options.preset.vae).eval()

    def identify(shapes: dict) -> str | None:
        width = shapes.get("class_emb.weight", [0])[-1]
        return next(
            (name for name, preset in PRESETS.items() if preset.architecture["encoder_embed_dim"] == width), None
        )

    weights = {
        options.model: load_weights(model, options.resume, what=options.model, device=device, identify=identify),
        "the VAE": load_weights(vae, options.vae_path, what="the VAE", device=device, ignore_prefixes=["loss."]),
    }
    return pack_linear_layers(cast_model(model, dtype)), for_inference(vae, dtype), weights


# Making images


def generate(
    job: Job, unfinished: list[int], run: RunFolder, model: MAR, vae: AutoencoderKL, options: Options
) -> Iterator[Batch]:
    """Make the images of each batch that this rank claims, unless all are there and only its record was lost."""
    device, labels = model.mask_token.device, torch.tensor(options.labels())
    flops_per_step = [step.total for step in options.flops]
    sampler = Sampler(
        model,
        **options.sampling,
        cfg_schedule=options.cfg_schedule,
        temperature=options.temperature,
        cuda_graphs=options.cuda_graphs,
    )
    for number in job.claim(unfinished):
        batch = run.known(number)
        batch.pixels = run.read_pixels(number)
        if batch.pixels is None:
            indices = run.indices(number)
            first = not sampler.is_warm(len(indices))
            batch = Batch(number, indices, first=first, worker=machine.where(device))
            with out_of_memory_explained(options.eval_bsz):
                start = time.perf_counter()
                noise = ImageNoise(model, options.seed, indices, options.num_sampling_steps, device)
                steps = StepProgress(len(indices), flops_per_step, device)
                job.watch.under_way = steps.images
                latents = sampler(labels[indices.start : indices.stop], noise, steps)
                check_finite(latents, "latents", batch.indices)  # waits for the device
                sampled = time.perf_counter()
                images = decode(vae, latents / model.latent_scale)
                check_finite(images, "decoded pixels", batch.indices)
                batch.pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
            batch.sample_seconds, batch.decode_seconds = sampled - start, time.perf_counter() - sampled
        yield batch


def check_finite(values: torch.Tensor, what: str, indices: range) -> None:
    broken = [index for index, finite in zip(indices, values.isfinite().flatten(1).all(dim=1).tolist()) if not finite]
    if broken:
        names = ", ".join(map(str, broken[:10])) + ", ..." * (len(broken) > 10)
        raise InputError(
            f"the {what} of images {names} are not finite: try --dtype float32, or other weights (--resume)"
        )


def add_features(batches: Iterable[Batch], extractor: Extractor | None) -> Iterator[Batch]:
    """Add what FID and IS are computed from, taken from the very pixels that the PNGs hold."""
    for batch in batches:
        if extractor is not None:
            start = time.perf_counter()
            pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).to(extractor.device)
            features, logits = zip(*map_images(extractor, pixels))
            batch.features, batch.logits = torch.cat(features).cpu().numpy(), torch.cat(logits).cpu().numpy()
            batch.score_seconds = time.perf_counter() - start
        yield batch


def save(job: Job, batches: Iterable[Batch], run: RunFolder, done: int) -> None:
    """Write batches in the background as they come, and show the progress of all ranks from `done` images on.

    Returns when all ranks are through; raises `Stopped` if a signal has ended `batches` early, once what was in
    flight is safe.
    """
    start = time.perf_counter()
    job.watch.done = 0  # the job may have finished other runs before

    def write(batch: Batch) -> None:
        run.save(batch)
        job.watch.count(len(batch.indices))

    with Progress(run.num_images, done, enabled=job.rank == 0) as progress, Writers() as writers:
        job.watch.on_tick = lambda: progress.update(done + job.watch.all_done())
        for batch in batches:
            job.watch.under_way = nothing
            writers.submit(write, batch)
        writers.flush()
        print(f"rank {job.rank}: {job.watch.done:,} images in {time.perf_counter() - start:.0f} s", flush=True)
        job.check_stop()
        job.gather(None)  # until the last rank is through
        progress.update(run.num_images)


# When all are made


def summarise(run: RunFolder, options: Options, reference: Statistics | None, extractor: Extractor | None) -> dict:
    """Score a run, print a short table, and return the numbers by name."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while lost := run.unfinished():
        if time.monotonic() > deadline:
            raise InputError(f"{run.path} has lost the batches {lost}; this makes them again: {command_line()}")
        time.sleep(1)
    batches = [run.read(number) for number in run.batch_numbers()]
    flops = Flops.of_steps(options.flops)
    metrics = {"num_images": run.num_images, "flops_per_image": flops.total, "flops_by_part": flops._asdict()}
    table = [f"images           {run.num_images:,} of {options.model}{', LazyMAR' * bool(options.cache)}"]
    if extractor is not None:
        features = torch.from_numpy(np.concatenate([batch.features for batch in batches]))
        logits = torch.from_numpy(np.concatenate([batch.logits for batch in batches]))
        scores = score(features, logits, reference)
        metrics.update(scores.metrics(extractor.kind), notes=scores.notes)
        table.append(scores.table(extractor.kind))

    # A process's first batches pay for what later ones find ready, so they count only where there are no others.
    timed = [batch for batch in batches if not math.isnan(batch.sample_seconds)]
    timed = [batch for batch in timed if not batch.first] or timed
    if timed:
        count = sum(len(batch.indices) for batch in timed)
        sampling = sum(batch.sample_seconds for batch in timed) / count
        decoding = sum(batch.decode_seconds for batch in timed) / count
        metrics["seconds_per_image"] = sampling + decoding
        metrics.update(sampling_seconds=sampling, decoding_seconds=decoding, timed_images=count)
        table.append(f"s per image      {sampling + decoding:.3f} (sampling {sampling:.3f}, decoding {decoding:.3f})")
    images_by_worker = Counter()
    for batch in batches:
        images_by_worker[batch.worker] += len(batch.indices)
    metrics["images_by_worker"] = images_by_worker
    table += [f"TFLOPs per image {flops.total / 1e12:.4g}", f"written to       {run.path}"]
    print("\n".join(table), flush=True)
    return metrics


def write_sheet(run: RunFolder, options: Options) -> None:
    """`grid.png`: the first images, by class, or all the chosen ones as they were asked for."""
    labels, shown = options.labels(), range(min(SHEET_IMAGES, run.num_images))
    if options.class_labels is None:
        shown = sorted(shown, key=lambda index: labels[index])
    run.write("grid.png", encode_png(contact_sheet([run.read_image(index) for index in shown])))


def main(job: Job) -> None:
    evaluate(job, parse_options(__doc__))


if __name__ == "__main__":
    sys.exit(launch(main))
