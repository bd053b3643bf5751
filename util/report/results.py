"""Finished runs as the page shows them, and their comparison with the baseline, image by image."""

import contextlib
import json
from datetime import datetime
from typing import Any

import numpy as np

from util.errors import InputError
from util.extractors import FEATURES_DIMS
from util.folder import RunFolder, open_finished
from util.metrics import Estimate, Statistics, groups_of_images, jackknife, read_scores, score
from util.options import Options, describe_method


class Row:
    """An evaluation and, if it has finished, what its run folder says; otherwise `folder` is None.

    FLOPs and seconds are per image, the latter of sampling. A score that is not known is None.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.metrics: dict[str, Any] = {}
        self.folder: RunFolder | None = None
        with contextlib.suppress(InputError):
            _, self.metrics, self.folder = open_finished(options.output_dir)
        self.method = self.metrics.get("method") or describe_method(options.method_name, options.method)
        self.flops = self.metrics.get("flops_per_image") or options.flops.total
        self.seconds = self.metrics.get("sampling_seconds")
        self.scores = read_scores(self.metrics)
        self.fid, self.inception_score, *_ = [*self.scores.values(), None, None]

    def conditions(self) -> str:
        """Describe the machine and the versions of a finished run, and the day on which it began."""
        file = self.options.output_dir / "run.json"
        run, day = json.loads(file.read_text()), datetime.fromtimestamp(file.stat().st_mtime).date()
        facts = {"dtype": run["settings"]["dtype"], **run["environment"]}
        return f"{day}: " + ", ".join(f"{name} {value}" for name, value in facts.items())


def compare(row: Row, baseline: Row) -> dict[str, Estimate]:
    """Compare a run with the baseline of the same seeds: numbers by name, with standard errors.

    "intended" is the share of the images in which the classifier sees the class that was asked for. Nothing is returned
    if one of the runs has not finished or has no scores, or if they have different numbers of images.
    """
    outputs = [each.folder.outputs() if each.folder else {} for each in (row, baseline)]
    if not all(outputs) or len(outputs[0]["logits"]) != len(outputs[1]["logits"]):
        return {}
    labels = np.array(row.options.labels())
    reference = Statistics.load(row.options.statistics, FEATURES_DIMS[row.options.preset.features])
    is_intended = outputs[0]["logits"].argmax(dim=1).numpy() == labels

    def measure(chosen: np.ndarray) -> list[float]:
        parts = [{name: output[chosen] for name, output in of_run.items()} for of_run in outputs]
        scores = [[*read_scores(score(part, reference)).values()] for part in parts]
        (fid, inception_score), (other_fid, _) = np.array(scores, dtype=float)  # nan for too few images
        return [fid, fid - other_fid, inception_score, is_intended[chosen].mean()]

    names = ("fid", "fid_difference", "inception_score", "intended")
    return dict(zip(names, jackknife(measure, groups_of_images(labels))))
