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
from util.files import atomic_write
from util.runs.images import encode_png, image_grid

PAIRS_PER_ROW, PAIRS_SHOWN = 10, 40
ROWS_SHOWN = (  # label, key in metrics.json, factor, format
    ("FID", "fid", 1, "{:.3f}"),
    ("IS", "isc", 1, "{:.3f}"),
    ("sampling, s per image", "sampling_seconds", 1, "{:.3f}"),
    ("with decoding, s per image", "seconds_per_image", 1, "{:.3f}"),
    ("TFLOPs per image", "flops_per_image", 1e-12, "{:.4g}"),
)


def read_metrics(folder: Path) -> dict:
    """Read a run's metrics.json. Raises InputError if the run has not finished."""
    path = folder / "metrics.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: finish that run with eval.py first") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run eval.py again") from None


def find(metrics: dict, name: str) -> tuple[str, float] | None:
    """Find a number by the start of its key, since scores carry their extractor's name, as in fid_fashion_classifier.

    Returns its key and value; None if there is none.
    """
    for key, value in metrics.items():
        is_score = key.startswith(name) and not key.endswith("_std") and name in ("fid", "isc")
        if (key == name or is_score) and isinstance(value, (int, float)):
            return key, value
    return None


def table(baseline: dict, other: dict) -> str:
    """Make a table of the two runs' numbers and their ratio, a line each."""
    lines = [f"{'':28s}{'baseline':>10s}{'other':>10s}{'ratio':>8s}"]
    for label, name, factor, style in ROWS_SHOWN:
        first, second = find(baseline, name), find(other, name)
        if first is None or second is None:
            continue
        if first[0] != second[0]:
            raise InputError(f"the runs were scored differently ({first[0]} and {second[0]}): score them alike")
        values = [style.format(value * factor) for _, value in (first, second)]
        label += "*" * (first[0] != name and "classifier" in first[0])
        lines.append(f"{label:28s}{values[0]:>10s}{values[1]:>10s}{second[1] / first[1]:>8.2f}")
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
