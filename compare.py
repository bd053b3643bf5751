"""Compare two finished runs of eval.py, such as baseline and LazyMAR: quality, speed, and images side by side.

python compare.py output/demo/baseline output/demo/lazymar --output side_by_side.png
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write
from util.folder import open_finished, side_by_side
from util.metrics import read_scores

COSTS = {  # label: key in metrics.json, factor, digits
    "sampling, s per image": ("sampling_seconds", 1, 3),
    "with decoding, s per image": ("seconds_per_image", 1, 3),
    "TFLOPs per image": ("flops_per_image", 1e-12, 4),
}


def table(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Make a table of the numbers that both runs have, and of their ratio; takes what each `metrics.json` holds."""
    runs = baseline, other
    references = {run["reference"]["sha256"]: run["reference"]["path"] for run in runs if "reference" in run}
    if len(references) > 1:
        raise InputError(f"the runs were scored against different statistics ({' and '.join(references.values())})")
    other_scores, rows = read_scores(other), []
    for number, value in read_scores(baseline).items():
        rows.append((number.label, value, other_scores.get(number), number.digits))
    for label, (key, factor, digits) in COSTS.items():
        first, second = (run[key] * factor if key in run else None for run in runs)
        rows.append((label, first, second, digits))
    lines = [f"{'':28s}{'baseline':>10s}{'other':>10s}{'ratio':>8s}"]
    for label, first, second, digits in rows:
        if first is not None and second is not None:
            ratio = f"{second / first:.2f}" if first else "-"
            lines.append(f"{label:28s}{first:10.{digits}f}{second:10.{digits}f}{ratio:>8s}")
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("baseline", type=Path, help="output folder of the run to compare with")
    parser.add_argument("other", type=Path, help="output folder of the run that is compared")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write images of both, side by side, there (PNG)")
    args = parser.parse_args(argv)
    (settings, metrics, run), (other_settings, other_metrics, other) = map(open_finished, (args.baseline, args.other))
    for name in ("model", "seed", "num_images", "class_labels"):
        if settings[name] != other_settings[name]:
            values = f"{settings[name]} and {other_settings[name]}"
            raise InputError(f"the runs differ in {name} ({values}): compare runs that agree in it")
    print(table(metrics, other_metrics))
    if args.output:
        with atomic_write(args.output) as partial:
            partial.write_bytes(side_by_side(run, other))
        print(f"side by side, the baseline on top: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
