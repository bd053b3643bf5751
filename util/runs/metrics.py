"""What a finished run amounts to: scores, seconds and FLOPs per image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.lazymar.flops import Flops
from util.runs.folder import Batch
from util.runs.options import Options
from util.scoring.scores import Extractor, Statistics, score


def summarise(
    batches: Sequence[Batch], options: Options, reference: Statistics | None, extractor: Extractor | None
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
        "flops_per_image": flops.total,
        "flops_by_part": flops._asdict(),
    }
    table = [f"images           {num_images:,} of {options.model}{', LazyMAR' * bool(options.cache)}"]
    if extractor is not None and reference is not None:
        features = torch.from_numpy(np.concatenate([batch.features for batch in batches]))
        logits = torch.from_numpy(np.concatenate([batch.logits for batch in batches]))
        scores = score(features, logits, reference)
        metrics.update(scores.metrics(extractor.name), notes=scores.notes)
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
