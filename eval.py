"""Generate images with MAR, LazyMAR or another method, and score them: FID, IS, seconds and FLOPs per image.

    torchrun --nproc_per_node=2 eval.py --num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar
    python eval.py --model mar_tiny --num_images 2000 --eval_bsz 100

The same command continues a run that was cut off, on any number of processes; `--help` lists the flags.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models import MARPipeline, Sampler
from util.errors import InputError
from util.extractors import Extractor
from util.folder import Batch
from util.images import map_images, to_pixels
from util.machine import retry_eagerly
from util.options import Options, parse_options
from util.processes import Job, launch
from util.run import Run, evaluate_sweep, open_run


def evaluate(job: Job, options: Options) -> dict[str, Any]:
    """Generate the images of a run that are missing, and score all of them.

    Returns what `metrics.json` holds, on all ranks; for several seeds or CFG scales, what their summary holds.

    Raises:
        InputError: something that the user can put right.
    """
    if options.sweep:
        return evaluate_sweep(job, options, evaluate)
    with open_run(job, options) as run:  # what can be refused is refused here, before long work
        pipe = MARPipeline(*run.networks, options.preset)
        sampler = pipe.sampler(options.plan, cuda_graphs=run.cuda_graphs)
        # Each step is an iterator over the batches of the one before: a batch passes all of them, then the next begins.
        batches = run.claim()
        batches = sampled(batches, sampler, run)
        batches = decoded(batches, pipe, sampler)
        batches = with_features(batches, run.extractor)
        run.save(batches)
        return run.finish()  # FID and Inception Score of all features, times, FLOPs


def sampled(batches: Iterable[Batch], sampler: Sampler, run: Run) -> Iterator[Batch]:
    """Add latents to each batch."""
    for batch in batches:
        size, start = len(batch.indices), time.perf_counter()
        batch.first = not sampler.is_warm(size)
        labels = torch.tensor([run.folder.labels[index] for index in batch.indices])
        batch.latents = retry_eagerly(sampler, sampler, labels, sampler.noise(run.options.seed, batch.indices))
        check_finite(batch.latents, "latents", batch.indices)  # waits for the device
        batch.sample_seconds = time.perf_counter() - start
        yield batch


def decoded(batches: Iterable[Batch], pipe: MARPipeline, sampler: Sampler) -> Iterator[Batch]:
    """Turn the latents of each batch into pixels."""
    for batch in batches:
        start = time.perf_counter()
        images = retry_eagerly(sampler, pipe.decode, batch.latents)
        check_finite(images, "decoded pixels", batch.indices)
        batch.pixels, batch.latents = to_pixels(images), None
        batch.decode_seconds = time.perf_counter() - start
        yield batch


def with_features(batches: Iterable[Batch], extractor: Extractor | None) -> Iterator[Batch]:
    """Add what the scores are computed from, taken from the very pixels that the PNGs hold."""
    for batch in batches:
        if extractor is not None:
            pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).to(extractor.device)
            parts = map_images(extractor, pixels)
            batch.outputs = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        yield batch


def check_finite(values: Tensor, what: str, indices: Sequence[int]) -> None:
    """Raise InputError, naming the first images, unless all `values` [B, ...] are finite."""
    broken = [index for index, each in zip(indices, values) if not each.isfinite().all()]
    if broken:
        names = ", ".join(map(str, broken[:10]))
        raise InputError(
            f"the {what} of images {names} are not finite: try --dtype float32, or other weights (--resume)"
        )


def main(job: Job) -> None:
    evaluate(job, parse_options(description=__doc__))


if __name__ == "__main__":
    sys.exit(launch(main))
