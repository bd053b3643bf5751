"""Generate images with MAR, LazyMAR or another method, and score them: FID, IS, seconds and FLOPs per image.

    torchrun --nproc_per_node=2 eval.py --num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar
    python eval.py --model mar_tiny --num_images 2000 --eval_bsz 100
    python eval.py --num_iter 64 --method lazymar+disa

The same command continues a run that was cut off, on any number of processes; `--help` lists the flags.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from models import AutoencoderKL, Sampler
from util.errors import InputError
from util.job.processes import Job, launch
from util.runs.folder import Batch
from util.runs.images import decode, map_images, to_pixels
from util.runs.options import Options, parse_options
from util.runs.run import Run, evaluate_seeds, open_run
from util.scoring.scores import Extractor
from util.weights.models import load_model


def evaluate(job: Job, options: Options) -> dict:
    """Generate those of a run's images that are missing, and score all of them.

    Returns what `metrics.json` holds, on all ranks; with several seeds, what `seeds.json` holds.

    Raises:
        InputError: something that the user can put right.
    """
    if options.more_seeds:
        return evaluate_seeds(job, options, evaluate)
    run = open_run(job, options)  # what can be refused is refused here, before long work
    options = run.options
    paths = {"weights": options.resume, "vae_weights": options.vae_path}
    model, vae = load_model(options.model, run.device, run.dtype, **paths)
    sampler = Sampler(
        model,
        **options.sampling,
        temperature=options.temperature,
        cuda_graphs=options.cuda_graphs,
    )
    # Each step is an iterator over the batches of the one before, so a batch passes all of them before the next begins.
    with run.faults_explained():
        batches = run.claim()
        batches = sampled(batches, sampler, run)
        batches = decoded(batches, vae, model.latent_scale)
        batches = with_features(batches, run.extractor)
        run.save(batches)
    return run.finish()  # FID and Inception Score of all features, times, FLOPs


def sampled(batches: Iterable[Batch], sampler: Sampler, run: Run) -> Iterator[Batch]:
    """Add latents to each batch, unless its pixels are there and only its record was lost."""
    for batch in batches:
        if batch.pixels is None:
            size, start = len(batch.indices), time.perf_counter()
            batch.first = not sampler.is_warm(size)
            noise = sampler.noise(run.options.seed, batch.indices)
            batch.latents = sampler(torch.tensor(batch.labels), noise, run.follow(batch))
            check_finite(batch.latents, "latents", batch.indices)  # waits for the device
            batch.sample_seconds = time.perf_counter() - start
        yield batch


def decoded(batches: Iterable[Batch], vae: AutoencoderKL, latent_scale: float) -> Iterator[Batch]:
    """Turn the latents of each batch into pixels."""
    for batch in batches:
        if batch.latents is not None:
            start = time.perf_counter()
            images = decode(vae, batch.latents / latent_scale)
            check_finite(images, "decoded pixels", batch.indices)
            batch.pixels, batch.latents = to_pixels(images), None
            batch.decode_seconds = time.perf_counter() - start
        yield batch


def with_features(batches: Iterable[Batch], extractor: Extractor | None) -> Iterator[Batch]:
    """Add what the scores are computed from, taken from the very pixels that the PNGs hold."""
    for batch in batches:
        if extractor is not None:
            start = time.perf_counter()
            pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).to(extractor.device)
            outputs = [torch.cat(parts).cpu().numpy() for parts in zip(*map_images(extractor, pixels))]
            batch.features, batch.logits, batch.dinov2 = (*outputs, None)[:3]  # DINOv2's only if they are wanted
            batch.score_seconds = time.perf_counter() - start
        yield batch


def check_finite(values: Tensor, what: str, indices: range) -> None:
    """Raise InputError, naming the images, unless all `values` [B, ...] are finite."""
    broken = [index for index, finite in zip(indices, values.isfinite().flatten(1).all(dim=1).tolist()) if not finite]
    if broken:
        names = ", ".join(map(str, broken[:10])) + ", ..." * (len(broken) > 10)
        raise InputError(
            f"the {what} of images {names} are not finite: try --dtype float32, or other weights (--resume)"
        )


def main(job: Job) -> None:
    evaluate(job, parse_options(__doc__))


if __name__ == "__main__":
    sys.exit(launch(main))
