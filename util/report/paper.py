"""The published figures that stand beside our own."""

from typing import NamedTuple


class PaperRow(NamedTuple):
    """A row of the main table of LazyMAR's paper (arXiv 2503.12450): ImageNet at 256 pixels, 64 steps, 50,000 images.

    Seconds, on an RTX 3090 and on a CPU, and TFLOPs are per image. `counted_tflops` are of the authors' code, counted
    by PyTorch's FlopCounterMode: matmuls, without the VAE.
    """

    gpu_seconds: float
    cpu_seconds: float
    tflops: float
    counted_tflops: float
    fid: float
    inception_score: float


TABLE = {  # (model, method)
    ("mar_base", "mar"): PaperRow(0.47, 28.97, 15.49, 14.653, 2.32, 281.1),
    ("mar_base", "lazymar"): PaperRow(0.21, 11.08, 5.54, 5.285, 2.45, 281.3),
    ("mar_large", "mar"): PaperRow(0.93, 59.66, 35.05, 33.070, 1.82, 296.1),
    ("mar_large", "lazymar"): PaperRow(0.40, 22.82, 12.52, 11.926, 1.93, 297.4),
    ("mar_huge", "mar"): PaperRow(1.74, 116.61, 69.06, 65.177, 1.59, 299.1),
    ("mar_huge", "lazymar"): PaperRow(0.75, 43.12, 24.38, 23.601, 1.69, 299.2),
}
