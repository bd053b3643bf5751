"""Compare two finished runs of `eval.py`, such as baseline and LazyMAR: quality, speed, and the images side by side.

python compare.py output/demo/baseline output/demo/lazymar --output side_by_side.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write, check_writable
from util.runs.images import encode_png, image_grid
from util.scoring.scores import Scores

PAIRS_PER_ROW, PAIRS_SHOWN = 10, 40
SCORES_SHOWN = {  # field of `Scores`: label, format
    "fid": ("FID", "{:.3f}"),
    "is_mean": ("IS", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "kid_mean": ("KID", "{:.5f}"),
    "fd_dinov2": ("FD-DINOv2", "{:.3f}"),
}
ROWS_SHOWN = (  # label, key in metrics.json, factor, format
    ("sampling, s per image", "sampling_seconds", 1, "{:.3f}"),
    ("with decoding, s per image", "seconds_per_image", 1, "{:.3f}"),
    ("TFLOPs per image", "flops_per_image", 1e-12, "{:.4g}"),
)


def read_metrics(folder: Path) -> dict:
    """Read a run's metrics.json. Raises InputError if the run has not finished."""
    path = folder / "metrics.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist: name a run's folder, or finish that run with eval.py first") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run eval.py again") from None


def table(baseline: dict, other: dict) -> str:
    """Make a table of the numbers that both runs have, and of their ratio, a line each."""
    lines = [f"{'':28s}{'baseline':>10s}{'other':>10s}{'ratio':>8s}"]

    def add(label: str, first: float | None, second: float | None, style: str) -> None:
        if first is None or second is None:
            return
        ratio = f"{second / first:.2f}" if first else "-"
        lines.append(f"{label:28s}{style.format(first):>10s}{style.format(second):>10s}{ratio:>8s}")

    (extractor, scores), (other_extractor, other_scores) = map(Scores.of_metrics, (baseline, other))
    if extractor and other_extractor and extractor != other_extractor:
        raise InputError(f"the runs were scored differently ({extractor} and {other_extractor}): score them alike")
    references = [metrics.get("reference", {}) for metrics in (baseline, other)]
    if all(references) and references[0]["sha256"] != references[1]["sha256"]:
        names = " and ".join(str(reference["path"]) for reference in references)
        raise InputError(f"the runs were scored against different statistics ({names}): score them alike")
    for name, (label, style) in SCORES_SHOWN.items():
        starred = extractor == "fashion" and name != "fd_dinov2"
        add(label + "*" * starred, getattr(scores, name), getattr(other_scores, name), style)
    for label, name, factor, style in ROWS_SHOWN:
        first, second = (None if metrics.get(name) is None else metrics[name] * factor for metrics in (baseline, other))
        add(label, first, second, style)
    if any("*" in line for line in lines):
        lines.append("* measured with a small classifier of the model's own data, not with Inception")
    return "\n".join(lines)


def side_by_side(baseline: Path, other: Path, count: int) -> np.ndarray:
    """Lay out images of the same seeds in pairs of rows: the baseline's, and below them the other run's."""
    names = sorted(path.name for path in (baseline / "images").glob("*.png"))
    names = [name for name in names if (other / "images" / name).exists()][:count]
    if not names:
        raise InputError(f"{baseline} and {other} have no images in common: run both with --save_images")
    images = []
    for start in range(0, len(names), PAIRS_PER_ROW):
        for folder in (baseline, other):
            for name in names[start : start + PAIRS_PER_ROW]:
                images.append(np.array(Image.open(folder / "images" / name)))
    return image_grid(images, columns=min(PAIRS_PER_ROW, len(names)))


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add("baseline", Path, "output folder of the run to compare with")
    parser.add("other", Path, "output folder of the run that is compared")
    parser.add("--output", Path, "write the images of both runs there, side by side (PNG)", metavar="FILE")
    return parser.parse_args(arguments)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output:
        check_writable(args.output)
    baseline, other = read_metrics(args.baseline), read_metrics(args.other)
    for name in ("model", "seed", "num_images"):
        values = baseline["settings"][name], other["settings"][name]
        if values[0] != values[1]:
            raise InputError(f"the runs differ in {name} ({values[0]} and {values[1]}): compare runs that agree in it")
    print(table(baseline, other))
    if args.output:
        with atomic_write(args.output) as partial:
            partial.write_bytes(encode_png(side_by_side(args.baseline, args.other, PAIRS_SHOWN)))
        print(f"side by side, the baseline above: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
