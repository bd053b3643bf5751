"""Standard errors of numbers that are measured on a set of images, such as FID: the jackknife over groups of images."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

GROUPS = 10


class Spread(NamedTuple):
    """A number and its standard error, which is nan if it is not known."""

    value: float
    error: float


def groups_of_images(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return a group number [N] for each image, given the classes [N], so that groups share each class evenly.

    Each image has its own random seed, so groups of images are as independent as runs with different seeds.
    """
    groups = np.empty(len(labels), int)
    groups[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % GROUPS
    return groups


def jackknife(measure: Callable[[np.ndarray], Sequence[float]], groups: np.ndarray) -> list[Spread]:
    """Return numbers that are measured on all images, each with its standard error, nan if there is only one group.

    Args:
        measure: maps a mask [N] of images to the numbers measured on them.
        groups:  [N] the group of each image.
    """
    values, numbers = measure(np.ones(len(groups), bool)), np.unique(groups)
    if len(numbers) < 2:
        return [Spread(value, math.nan) for value in values]
    left_out = np.array([measure(groups != number) for number in numbers], float)
    errors = left_out.std(axis=0) * math.sqrt(len(numbers) - 1)
    return [Spread(float(value), float(error)) for value, error in zip(values, errors)]
