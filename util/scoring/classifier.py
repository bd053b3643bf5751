"""A small Fashion-MNIST classifier whose features stand in for Inception's where images show no ImageNet classes.

Importing this module registers it with torch-fidelity under the name "fashion-classifier". FID and IS from it are on
a scale of their own: compare them with each other and with the real-vs-real floor, never with Inception numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from util.errors import InputError
from util.weights.checkpoint import load_weights

CLASSIFIER_PATH = Path(__file__).resolve().parents[2] / "pretrained_models" / "fashion_classifier.safetensors"
FEATURE_EXTRACTOR_NAME = "fashion-classifier"
FEATURES_DIM = 128
PIXEL_MEAN, PIXEL_STD = 0.286, 0.353  # of Fashion-MNIST's 28 x 28 training images, in [0, 1]


class FashionClassifier(nn.Module):
    """Maps uint8 images [B, 3, 32, 32] to features [B, 128] and to logits [B, 10], which are linear in the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(3, 32),
            nn.MaxPool2d(2),  # 16 x 16
            _convolution(32, 64),
            Residual(64),
            _convolution(64, 128),
            nn.MaxPool2d(2),  # 8 x 8
            Residual(128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES_DIM, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (images.to(self.head.weight.dtype) / 255 - PIXEL_MEAN) / PIXEL_STD
        features = self.layers(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class FashionFeatureExtractor(FeatureExtractorBase):
    """The classifier as torch-fidelity wants it: `calculate_metrics(feature_extractor="fashion-classifier", ...)`.

    Args:
        name:          the name under which it is registered.
        features_list: some of "features" (used for FID) and "logits" (used for IS).
        feature_extractor_weights_path: a `.safetensors` file of `FashionClassifier`; None means the shipped one.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | Path | None = None, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path or CLASSIFIER_PATH)
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, 32, 32):
            shape = list(images.shape)
            raise InputError(f"The Fashion-MNIST classifier takes 32 x 32 RGB images, not {images.dtype} {shape}.")
        features, logits = self.classifier(images)
        outputs = {"features": features, "logits": logits}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


register_feature_extractor(FEATURE_EXTRACTOR_NAME, FashionFeatureExtractor)


def load_classifier(path: str | Path = CLASSIFIER_PATH) -> FashionClassifier:
    """Load the classifier from a weights file, in eval mode and float32.

    Raises:
        InputError: the file is missing or damaged, or holds another network.
    """
    classifier = FashionClassifier()
    load_weights(classifier, path, what="the Fashion-MNIST classifier")
    return classifier.eval()
