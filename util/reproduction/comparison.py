"""Two finished runs of the same seeds, compared image by image."""

from __future__ import annotations

import numpy as np
import torch

from util.reproduction.results import Comparison, Evaluation
from util.runs.options import CheckedOptions
from util.runs.run import run_folder
from util.scoring.jackknife import groups_of_images, jackknife
from util.scoring.scores import FEATURES_DIMS, Statistics, score


def is_whole(options: CheckedOptions) -> bool:
    """True if an evaluation has come to its end and each of its files is still there."""
    return (options.output_dir / "metrics.json").exists() and not run_folder(options).unfinished()


def read_run(options: CheckedOptions, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features [N, F], logits [N, K] and pixels [N, H, W, 3] float32 of a finished run's first `count` images."""
    run = run_folder(options)
    batches = [run.read(number) for number in run.batch_numbers()]
    features, logits = (
        torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches])[:count])
        for name in ("features", "logits")
    )
    return features, logits, np.stack([run.read_image(index) for index in range(count)]).astype(np.float32)


def compare_with_baseline(
    options: CheckedOptions,
    baseline: CheckedOptions,
    count: int,
    evaluation: Evaluation,
    *,
    ablation: str | None,
    label: str,
) -> Comparison:
    """Score the first `count` images of a run and measure their distance to the baseline's, each with its error.

    `evaluation` is the run's own, of all its images.
    """
    reference = Statistics.load(options.statistics, FEATURES_DIMS[options.preset.features])
    features, logits, pixels = read_run(options, count)
    baseline_features, baseline_logits, baseline_pixels = read_run(baseline, count)
    distance = np.abs(pixels - baseline_pixels).mean(axis=(1, 2, 3))

    def measure(chosen: np.ndarray) -> list[float]:
        scores = score(features[chosen], logits[chosen], reference)
        baseline_scores = score(baseline_features[chosen], baseline_logits[chosen], reference)
        fid, baseline_fid, inception_score = (
            np.nan if number is None else number for number in (scores.fid, baseline_scores.fid, scores.is_mean)
        )
        return [fid, inception_score, fid - baseline_fid, distance[chosen].mean()]

    groups = groups_of_images(options.labels()[:count])
    fid, inception_score, fid_difference, pixel_distance = jackknife(measure, groups)
    return Comparison(
        ablation=ablation,
        label=label,
        num_images=count,
        sampling_seconds=evaluation.sampling_seconds,
        flops_per_image=evaluation.flops_per_image,
        fid=fid,
        inception_score=inception_score,
        fid_difference=fid_difference,
        pixel_distance=pixel_distance,
        pixel_distance_by_group=[float(distance[groups == group].mean()) for group in np.unique(groups)],
        notes=list(score(features, logits, reference).notes),
    )
