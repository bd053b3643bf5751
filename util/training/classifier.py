"""Training of the Fashion-MNIST classifier that scores the small model's images."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from util.machine import mixed_precision
from util.scoring.classifier import CLASSIFIER_PATH, FashionClassifier, load_classifier
from util.training.fashion import FASHION_MNIST_FOLDER, load_fashion_mnist
from util.training.loop import fit
from util.weights.checkpoint import save_safetensors


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
    classifier = FashionClassifier().to(device).to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        with mixed_precision(device):
            _, logits = classifier(_flip_and_shift(images[chosen], generator))
        return F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)

    # The last weights and not their average, which would need the running statistics of its own batch norms.
    fit(
        classifier,
        loss,
        folder=output_dir,
        steps=steps,
        lr=lr,
        weight_decay=0.05,
        settings={"--batch_size": batch_size, "--seed": seed},
        device=device,
    )
    weights = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in classifier.state_dict().items()
    }
    path = output_dir / CLASSIFIER_PATH.name
    save_safetensors(weights, path, {})
    result = accuracy(load_classifier(path).to(device), test_images, test_labels)
    print(f"{path}: test accuracy {result:.2%}", flush=True)
    return result


@torch.inference_mode()
def accuracy(classifier: FashionClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """Share of images [N, 3, 32, 32] uint8 whose largest logit is their label's, in [0, 1]."""
    device = classifier.head.weight.device
    predictions = [classifier(batch.to(device))[1].argmax(1).cpu() for batch in images.split(batch_size)]
    return (torch.cat(predictions) == labels).double().mean().item()


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
