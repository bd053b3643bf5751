"""How far a number that is measured on a set of images may be off by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable, NamedTuple

import numpy as np

GROUPS = 10


class Spread(NamedTuple):
    """A number and its standard error; nan for what is not known."""

    value: float
    error: float


def groups_of_images(num_images: int, num_classes: int) -> np.ndarray:
    """The group [num_images] of each image of a run, in which image i is of class i mod `num_classes`.

    A group has as many images of each class as any other, up to one. Each image has a random seed of its own, so groups
    of images are as independent as runs of several seeds.
    """
    return np.arange(num_images) // num_classes % GROUPS


def jackknife(measure: Callable[[np.ndarray], Sequence[float]], groups: np.ndarray) -> list[Spread]:
    """What `measure` finds on all images, and how much that varies when each group of them in turn is left out.

    Args:
        measure: numbers of the images of a mask [N].
        groups:  [N] the group of each image.

    Returns:
        For each number its value on all images, and the jackknife's standard error, nan with a single group.
    """
    values = measure(np.ones(len(groups), bool))
    numbers = np.unique(groups)
    if len(numbers) < 2:
        return [Spread(value, math.nan) for value in values]
    left_out = np.array([measure(groups != number) for number in numbers], float)
    deviations = left_out - left_out.mean(axis=0)
    errors = np.sqrt((len(numbers) - 1) / len(numbers) * (deviations**2).sum(axis=0))
    return [Spread(float(value), float(error)) for value, error in zip(np.array(values, float), errors)]


def difference(groups: Sequence[float], others: Sequence[float]) -> Spread:
    """How much one mean is above another of the same groups of images, given each group's two means.

    What the images have in common cancels: this is surer than the means themselves.
    """
    differences = np.array(groups) - np.array(others)
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return Spread(float(differences.mean()), float(error))
