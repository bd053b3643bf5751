"""Standard errors of numbers that are measured on a set of images, such as FID: the jackknife over groups of images."""

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


def groups_of_images(labels: Sequence[int]) -> np.ndarray:
    """Group number [N] of each image of a run, given the images' classes: those of one class take turns, then the next.

    All groups have the same number of images, and of images of each class, up to one. Each image has a random seed of
    its own, so groups of images are as independent as runs with different seeds.
    """
    by_class = np.argsort(labels, kind="stable")
    groups = np.empty(len(labels), int)
    groups[by_class] = np.arange(len(labels)) % GROUPS
    return groups


def random_groups(num_images: int) -> np.ndarray:
    """Group number [N] of each image of a set whose classes are not known, drawn with a fixed seed."""
    return np.random.RandomState(0).permutation(num_images) % GROUPS


def jackknife(measure: Callable[[np.ndarray], Sequence[float]], groups: np.ndarray) -> list[Spread]:
    """Measure numbers on all images, and how much they vary when each group of images in turn is left out.

    Args:
        measure: takes a mask [N] of images and returns the numbers measured on those.
        groups:  [N] the group of each image.

    Returns:
        Each number's value on all images with the jackknife's standard error, nan if there is a single group.
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
    """Difference of two means over the same groups of images, given each group's mean of the one and of the other.

    Its error is smaller than those of the means, because what the groups have in common cancels.
    """
    differences = np.array(groups) - np.array(others)
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return Spread(float(differences.mean()), float(error))
