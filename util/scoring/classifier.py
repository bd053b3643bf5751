"""A small Fashion-MNIST classifier whose features stand in for Inception's where images show no ImageNet classes.

Importing this module registers it with torch-fidelity under the name "fashion-classifier". FID and IS from it are on
a scale of their own: compare them with each other and with the real-vs-real floor, never with Inception numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from util.errors import InputError
from util.machine import mixed_precision
from util.training.fashion import FASHION_MNIST_FOLDER, load_fashion_mnist
from util.training.loop import fit
from util.weights.checkpoint import load_weights, save_safetensors

CLASSIFIER_PATH = Path(__file__).resolve().parents[2] / "pretrained_models" / "fashion_classifier.safetensors"
FEATURE_EXTRACTOR_NAME = "fashion-classifier"
FEATURES_DIM = 128
PIXEL_MEAN, PIXEL_STD = 0.286, 0.353  # of Fashion-MNIST's 28 x 28 training images, in [0, 1]


class FashionClassifier(nn.Module):
    """uint8 images [B, 3, 32, 32] -> features [B, 128] and the logits [B, 10] that are linear in them."""

    def __init__(self):
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

    def __init__(self, channels: int):
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

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path=None, **_):
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
    """The classifier of a weights file, in eval mode and float32.

    Raises:
        InputError: the file is missing or damaged, or holds another network.
    """
    classifier = FashionClassifier()
    load_weights(classifier, path, what="the Fashion-MNIST classifier")
    return classifier.eval()


@torch.inference_mode()
def accuracy(classifier: FashionClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """Share of the images [N, 3, 32, 32] uint8 whose largest logit is their label's, in [0, 1]."""
    device = classifier.head.weight.device
    predictions = [classifier(batch.to(device))[1].argmax(1).cpu() for batch in images.split(batch_size)]
    return (torch.cat(predictions) == labels).double().mean().item()


def train_classifier(
    output_dir: str | Path,
    *,
    data_folder: str | Path = FASHION_MNIST_FOLDER,
    steps: int = 2400,
    batch_size: int = 250,
    lr: float = 4e-3,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float:
    """Train `FashionClassifier` on images that are flipped and shifted at random.

    Writes `fashion_classifier.safetensors` (bfloat16, 0.9 MB) to `output_dir`; a call that was stopped is continued
    by the next one with the same settings.

    Returns:
        The accuracy on the 10,000 test images of the weights as they were written, in [0, 1].

    Raises:
        InputError: the data cannot be read, or `output_dir` holds another training.
    """
    device, output_dir = torch.device(device), Path(output_dir)
    test_images, test_labels = load_fashion_mnist(data_folder, "test")
    images, labels = (tensor.to(device) for tensor in load_fashion_mnist(data_folder, "train"))
    torch.manual_seed(seed)
    classifier = FashionClassifier().to(device, memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        with mixed_precision(device):
            _, logits = classifier(_flip_and_shift(images[chosen], generator))
        return F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)

    # The last weights and not their average, which would need the running statistics of its own batch norms.
    fit(classifier, loss, folder=output_dir, steps=steps, lr=lr, weight_decay=0.05, device=device)
    weights = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in classifier.state_dict().items()
    }
    path = output_dir / CLASSIFIER_PATH.name
    save_safetensors(weights, path, {})
    result = accuracy(load_classifier(path).to(device), test_images, test_labels)
    print(f"{path}: test accuracy {result:.2%}", flush=True)
    return result


def _flip_and_shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images [B, 3, 32, 32], and shift each by up to 2 pixels: their black border is that wide."""
    count, _, height, width = images.shape
    device = images.device
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    shift = torch.randint(-2, 3, (2, count, 1), generator=generator, device=device)
    rows = (torch.arange(height, device=device) + shift[0]) % height  # [B, 32]
    columns = (torch.arange(width, device=device) + shift[1]) % width
    columns = torch.where(flip, columns.flip(1), columns)
    image = torch.arange(count, device=device)[:, None, None]
    return images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
