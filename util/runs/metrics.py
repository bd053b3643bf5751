"""What a finished run amounts to: scores, seconds and FLOPs per image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from models.lazymar.flops import Flops
from util.files import file_digest
from util.runs.folder import Batch
from util.runs.methods import in_words
from util.runs.options import CheckedOptions
from util.scoring.scores import KEYS, Extractor, Statistics, score


def summarise(
    batches: Sequence[Batch], options: CheckedOptions, reference: Statistics | None, extractor: Extractor | None
) -> tuple[dict[str, Any], str]:
    """Compute a run's metrics by name, as `metrics.json` holds them, and a table of them for a person.

    Args:
        batches:   all of the run, with the features of their images.
        reference: statistics of the images that FID compares with; None without an extractor.
        extractor: the network that the features come from; None if no scores are wanted.
    """
    num_images = sum(len(batch.indices) for batch in batches)
    flops = Flops.of_steps(options.flops)
    metrics: dict[str, Any] = {
        "num_images": num_images,
        "method": in_words(options.method),
        "flops_per_image": flops.total,
        "flops_by_part": flops._asdict(),
    }
    table = [f"images           {num_images:,} of {options.model}, method {in_words(options.method)}"]
    if extractor is not None and reference is not None:
        features = torch.from_numpy(np.concatenate([batch.features for batch in batches]))
        logits = torch.from_numpy(np.concatenate([batch.logits for batch in batches]))
        dinov2 = None
        if options.metrics.fd_dinov2:
            dinov2 = torch.from_numpy(np.concatenate([batch.dinov2 for batch in batches]))
        labels = [label for batch in batches for label in batch.labels]
        scores = score(features, logits, reference, options.metrics, dinov2, labels=labels, progress=True)
        metrics.update(scores.metrics(extractor.name), notes=scores.notes)
        metrics["reference"] = {"path": str(options.statistics), "sha256": file_digest(options.statistics)}
        table.append(scores.table(extractor.name))

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
    images_by_worker: Counter[str] = Counter()
    for batch in batches:
        images_by_worker[batch.worker] += len(batch.indices)
    metrics["images_by_worker"] = images_by_worker
    table.append(f"TFLOPs per image {flops.total / 1e12:.4g}")
    return metrics, "\n".join(table)


def summarise_seeds(runs: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Compute mean and spread over runs that differ in their seeds, and a table of them for a person.

    Args:
        runs: what `metrics.json` of each run holds, by seed.

    Returns:
        A dict of `seeds`, `num_images` of each run, and the `mean` and `spread` of each number that all runs have; the
        spread is the sample standard deviation. Then the table.
    """
    names = [
        *(key for keys in KEYS.values() for key in keys.values() if not key.endswith("_std")),
        "seconds_per_image",
        "sampling_seconds",
    ]
    all_values: dict[str, Any] = {
        name: [metrics.get(name) for metrics in runs.values()] for name in dict.fromkeys(names)
    }
    values = {name: of_runs for name, of_runs in all_values.items() if None not in of_runs}
    mean = {name: float(np.mean(of_runs)) for name, of_runs in values.items()}
    spread = {name: float(np.std(of_runs, ddof=1)) for name, of_runs in values.items()}
    num_images = next(iter(runs.values()))["num_images"]
    lines = [f"seeds {', '.join(map(str, runs))}, {num_images:,} images each: mean ± standard deviation"]
    lines += [f"{name:32s} {mean[name]:.4g} ± {spread[name]:.2g}" for name in values]
    return {"seeds": list(runs), "num_images": num_images, "mean": mean, "spread": spread}, "\n".join(lines)
