"""The networks that scores are computed from: Inception, DINOv2, and a classifier for Fashion-MNIST.

Scores of the Fashion-MNIST classifier have a scale of their own: compare them with each other, never with scores of
Inception.
"""

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from util.download import download
from util.errors import InputError, why_unreadable
from util.machine import ROOT, weights_digest
from util.weights import load_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
FEATURES_DIMS = {"inception": 2048, "fashion": 128}  # features per image, by the extractor's name
DINOV2_DIM = 1024
CLASSIFIER_PATH = ROOT / "pretrained_models" / "fashion_classifier.safetensors"
PIXEL_MEAN, PIXEL_STD = 0.286, 0.353  # of Fashion-MNIST's 28 x 28 training images, in [0, 1]


def import_torch_fidelity() -> Any:
    """Import torch-fidelity. Raises InputError if it is too old, or if it cannot be imported.

    Versions before 0.4.0, 0.4.0-beta included, exchange precision and recall.
    """
    with contextlib.suppress(Exception):  # an old version meets a recent PyTorch
        module = importlib.import_module("torch_fidelity")
        if TorchVersion(module.__version__) >= "0.4.0":
            return module
    raise InputError("scores need torch-fidelity 0.4.0 or later: run `pip install --upgrade 'torch-fidelity>=0.4.0'`")


class Extractor:
    """Maps uint8 images [B, 3, H, W] on any device to float32 outputs, by name.

    "features" are [B, 2048] or [B, 128], "logits" [B, 1008] or [B, 10], both of `network`; "dinov2" are [B, 1024], of a
    second network. The networks and their outputs are on `device`.
    """

    def __init__(
        self, name: str, network: nn.Module, device: torch.device | str = "cpu", dinov2: nn.Module | None = None
    ) -> None:
        self.name, self.device = name, torch.device(device)
        self.networks: dict[tuple[str, ...], nn.Module] = {("features", "logits"): network.to(device)}
        if dinov2 is not None:
            self.networks["dinov2",] = dinov2.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for names, network in self.networks.items():
            outputs.update(zip(names, network(images.to(self.device)), strict=True))
        return outputs

    @property
    def identity(self) -> str:
        """The networks' classes, and digests of their weights."""
        return ", ".join(f"{type(each).__name__} {weights_digest(each)}" for each in self.networks.values())


def load_extractor(
    name: str, weights_path: Path | None = None, device: torch.device | str = "cpu", *, with_dinov2: bool = False
) -> Extractor:
    """Load the networks that images are scored by.

    Args:
        name:         "inception": torch-fidelity's "inception-v3-compat", the standard for FID and Inception Score.
                      "fashion": `FashionClassifier`, for images of 32 x 32 pixels.
        weights_path: its weights. Default: the shipped classifier; for Inception, the file in PyTorch's hub folder,
                      which is downloaded (95 MB) if it is missing. Let one process load it first.
        with_dinov2:  also load DINOv2, by PyTorch's hub.

    Raises InputError if weights cannot be downloaded, are damaged, could run code, or do not fit.
    """
    torch_fidelity, dinov2 = import_torch_fidelity(), None
    try:
        if name == "fashion":
            network: nn.Module = FashionClassifier().requires_grad_(False).eval()
            load_weights(network, weights_path or CLASSIFIER_PATH, what="the Fashion-MNIST classifier")
        else:
            network = _load_inception(weights_path)
        if with_dinov2:
            dinov2 = torch_fidelity.FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
    except InputError:
        raise
    except Exception as error:  # a damaged file, or the code that PyTorch's hub runs, can fail in any way
        raise InputError(
            f"a network for scores cannot be loaded ({why_unreadable(error)}): run the command where GitHub can be "
            f"reached and copy PyTorch's hub folder, {torch.hub.get_dir()}, or name Inception's {INCEPTION_FILE} of "
            "torch-fidelity's release with --inception_weights"
        ) from None
    return Extractor(name, network, device, dinov2)


def _load_inception(weights_path: Path | None) -> nn.Module:
    path = weights_path or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)  # where torch-fidelity looks
    if weights_path is None:
        download(INCEPTION_URL, path)
    # torch-fidelity unpickles its file without a check, so it gets a copy of the checked tensors.
    checked = io.BytesIO()
    torch.save(torch.load(path, map_location="cpu", weights_only=True), checked)
    checked.seek(0)
    return import_torch_fidelity().FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
    )


class FashionClassifier(nn.Module):
    """Maps uint8 images [B, 3, 32, 32] to features [B, 128] and to logits [B, 10], which are linear in the features."""

    def __init__(self) -> None:
        super().__init__()
        features_dim = FEATURES_DIMS["fashion"]
        self.layers = nn.Sequential(
            _convolution(3, 32),
            nn.MaxPool2d(2),  # 16 x 16
            _convolution(32, 64),
            Residual(64),
            _convolution(64, features_dim),
            nn.MaxPool2d(2),  # 8 x 8
            Residual(features_dim),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(features_dim, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (3, 32, 32):
            raise InputError(f"the Fashion-MNIST classifier takes 32 x 32 RGB images, not {list(images.shape)}")
        x = (images.to(self.head.weight.dtype) / 255 - PIXEL_MEAN) / PIXEL_STD
        features = self.layers(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
