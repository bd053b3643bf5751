"""The figures that papers publish, each with its source, to compare our own with."""

from __future__ import annotations

from dataclasses import dataclass

from models import Method
from models.lazymar.methods import LAZYMAR

# The two that the table compares for each model, by the name that it has for them: the baseline is MAR in full.
TABLE_METHODS = {"baseline": Method(), "LazyMAR": LAZYMAR}
LAZYMAR_PAPER = "arXiv 2503.12450"
MAR_PAPER = "arXiv 2406.11838"
PARAMETERS = {"mar_base": 208e6, "mar_large": 479e6, "mar_huge": 943e6}  # as the MAR paper has them


def name_in_table(method: Method) -> str | None:
    """Return the table's name for a method; None for one that it does not have."""
    return next((name for name, its_method in TABLE_METHODS.items() if its_method == method), None)


@dataclass(frozen=True)
class PaperRow:
    """A row of the main table of LazyMAR (arXiv 2503.12450): ImageNet at 256 pixels, 64 steps, 50,000 images.

    gpu_seconds, cpu_seconds: per image, the former on an RTX 3090.
    tflops:                   per image, as the paper's table has them.
    counted_tflops:           of the authors' code, counted by PyTorch's FlopCounterMode: matmuls, without the VAE.
    """

    gpu_seconds: float
    cpu_seconds: float
    tflops: float
    counted_tflops: float
    speed_up: float
    fid: float
    inception_score: float


TABLE = {  # (model, method)
    ("mar_base", "baseline"): PaperRow(0.47, 28.97, 15.49, 14.653, 1.00, 2.32, 281.1),
    ("mar_base", "LazyMAR"): PaperRow(0.21, 11.08, 5.54, 5.285, 2.80, 2.45, 281.3),
    ("mar_large", "baseline"): PaperRow(0.93, 59.66, 35.05, 33.070, 1.00, 1.82, 296.1),
    ("mar_large", "LazyMAR"): PaperRow(0.40, 22.82, 12.52, 11.926, 2.80, 1.93, 297.4),
    ("mar_huge", "baseline"): PaperRow(1.74, 116.61, 69.06, 65.177, 1.00, 1.59, 299.1),
    ("mar_huge", "LazyMAR"): PaperRow(0.75, 43.12, 24.38, 23.601, 2.83, 1.69, 299.2),
}


@dataclass(frozen=True)
class OtherMethod:
    """Another training-free method on MAR-H, as its own paper states it.

    speed_up: from, to.
    fid:      None where the paper gives the speed-up alone.
    """

    name: str
    source: str
    speed_up: tuple[float, float]
    fid: float | None
    note: str


OTHER_METHODS = (
    OtherMethod("MARché", "arXiv 2506.12035", (1.7, 1.7), None, "up to 1.7 times faster"),
    OtherMethod("GtR", "arXiv 2510.17171", (3.72, 3.72), 1.59, "3.72 times faster at FID 1.59, IS 304.4"),
    OtherMethod(
        "DiSA",
        "arXiv 2505.20297",
        (5.0, 10.0),
        None,
        "5 to 10 times faster than 256 steps of 100 denoising steps: 64 steps, denoising steps annealed from 50 to 5",
    ),
)


@dataclass(frozen=True)
class PublishedPoint:
    """A row of GtR's table (arXiv 2510.17171): MAR-H, 64 steps, ImageNet at 256 pixels. Its GPU is not stated.

    These are second-hand: they come from notes on that paper, not from the paper itself.
    """

    name: str
    seconds: float  # per image
    tflops: float  # per image
    speed_up: float
    fid: float
    inception_score: float


GTR_TABLE_SOURCE = "arXiv 2510.17171"
GTR_TABLE = (
    PublishedPoint("MAR-H", 0.81, 64.52, 1.00, 1.59, 299.1),
    PublishedPoint("Halton order", 0.33, 27.11, 2.38, 3.18, 261.7),
    PublishedPoint("DiSA", 0.27, 21.59, 2.99, 2.11, 283.1),
    PublishedPoint("LazyMAR", 0.27, 18.85, 3.42, 1.94, 284.1),
    PublishedPoint("GtR", 0.22, 17.34, 3.72, 1.59, 304.4),
)
