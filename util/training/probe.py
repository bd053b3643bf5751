"""The context probe: how well a MAR predicts unknown tokens from known ones, measured without its diffusion head.

A linear readout of the conditions predicts the unknown tokens. Its error is divided by that of the best linear
prediction from class, position and the same known tokens, which needs no training: a ratio above 1 says that the
transformer makes less of the known tokens than a closed formula does, one below 1 that it has learned more than means
and covariances.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from models.mar import MAR

KNOWN_SHARES = (0.0, 0.1, 0.3, 0.5, 0.75)  # of an image's tokens: 0, 26, 77, 128 and 192 of 256
FITTED_SHARE = 0.7  # of the images, which the readout is fitted on; its error is measured on the others


class ContextProbe:
    """Prints how much a network uses the tokens that it knows, on images that it is not trained on.

    Args:
        train_tokens: tokens [M, L, C] of the training images, which the linear prediction is computed from; 20,000
                      images are enough for 512 numbers each.
        train_labels: their classes [M].
        tokens:       tokens [N, L, C] of images to measure on; 300 images are enough.
        labels:       their classes [N].
    """

    def __init__(self, train_tokens: Tensor, train_labels: Tensor, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels
        self.linear = linear_errors(train_tokens, train_labels, tokens, labels)
        _write(f"RMS error of unknown tokens, best linear prediction: {_by_known(self.linear)} known")

    def __call__(self, when: str, network: MAR) -> None:
        """Measure a network in evaluation, and print its errors and their ratios to the linear prediction's."""
        errors = readout_errors(network, self.tokens, self.labels)
        ratios = {known: error / self.linear[known] for known, error in errors.items()}
        _write(f"{when}: {_by_known(errors)} known; relative to the best linear prediction: {_by_known(ratios)}")


def _write(line: str) -> None:
    """Print a line above the progress bar at once, also where the output goes to a file."""
    tqdm.write(line)
    sys.stdout.flush()


def _by_known(values: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.3f} at {known}" for known, value in values.items())


@torch.inference_mode()
def readout_errors(network: MAR, tokens: Tensor, labels: Tensor) -> dict[int, float]:
    """Measure the RMS error of unknown tokens that a linear readout of the network's conditions predicts.

    The readout is fitted by least squares, for each number of known tokens, on the first `FITTED_SHARE` of the images.

    Args:
        tokens: tokens [N, L, C] of images that the network was not trained on.
        labels: their classes [N].

    Returns:
        The error by the number of known tokens.
    """
    order = _random_order(tokens)
    ordered = tokens.gather(1, order[..., None].expand_as(tokens))
    fitted, errors = int(FITTED_SHARE * len(tokens)), {}
    for known in _numbers_known(tokens):
        conditions = torch.cat(
            [
                network(network.class_emb(label), part[:, :known], positions).double()
                for label, part, positions in zip(labels.split(50), ordered.split(50), order.split(50))
            ]
        )
        inputs = torch.cat([conditions, torch.ones_like(conditions[..., :1])], dim=-1)
        targets = ordered[:, known:].double()
        a, b = inputs[:fitted].flatten(0, 1), targets[:fitted].flatten(0, 1)
        ridge = 1e-3 * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        error = inputs[fitted:] @ torch.linalg.solve(a.T @ a + ridge, a.T @ b) - targets[fitted:]
        errors[known] = error.square().mean().sqrt().item()
    return errors


@torch.inference_mode()
def linear_errors(train_tokens: Tensor, train_labels: Tensor, tokens: Tensor, labels: Tensor) -> dict[int, float]:
    """Measure the RMS error of the best linear prediction of the tokens that `readout_errors` measures.

    The prediction is the conditional mean of a Gaussian with the training tokens' class means and their covariance
    around these, which all classes share. The arguments are those of `ContextProbe`; the result is as that of
    `readout_errors`.
    """
    classes = int(max(train_labels.max(), labels.max())) + 1
    means = torch.zeros(classes, *train_tokens.shape[1:], dtype=torch.float64, device=tokens.device)
    for label in train_labels.unique():
        means[label] = train_tokens[train_labels == label].double().mean(dim=0)
    covariance = 1e-4 * torch.eye(means[0].numel(), dtype=torch.float64, device=tokens.device)
    for part, label in zip(train_tokens.split(2000), train_labels.split(2000)):
        residual = (part.double() - means[label]).flatten(1)
        covariance += residual.T @ residual / len(train_tokens)
    channels = torch.arange(tokens.shape[2], device=tokens.device)
    errors: dict[int, list[Tensor]] = {known: [] for known in _numbers_known(tokens)}
    residuals = (tokens.double() - means[labels]).flatten(1)
    fitted = int(FITTED_SHARE * len(tokens))
    for order, residual in zip(_random_order(tokens)[fitted:], residuals[fitted:]):
        entries = order[:, None] * tokens.shape[2] + channels  # [L, C], indices into the flat image
        for known, squares in errors.items():
            seen, unseen = entries[:known].flatten(), entries[known:].flatten()
            weights = torch.linalg.solve(covariance[seen][:, seen], residual[seen])
            squares.append((covariance[unseen][:, seen] @ weights - residual[unseen]).square().mean())
    return {known: torch.stack(squares).mean().sqrt().item() for known, squares in errors.items()}


def _numbers_known(tokens: Tensor) -> list[int]:
    return [round(share * tokens.shape[1]) for share in KNOWN_SHARES]


def _random_order(tokens: Tensor) -> Tensor:
    """Draw the order in which each image's positions become known, [N, L]; it is always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens.shape[:2], generator=generator).argsort(dim=1).to(tokens.device)
