"""Which rows a lazy step recomputes. A rule scores all rows; the rows with the lowest scores are chosen.

A rule compares each row's `features` at this step with those that it stored at the step before.

To add a rule, add a class with the same methods and an entry in `RULES`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Similarity:
    """The paper's rule: cosine similarity of a row's values at this step and the step before, averaged over attention
    heads. The values are those of the prune layer's attention.

    Args:
        num_steps:     autoregressive steps.
        num_sequences: images times the branches that lazy steps compute.
        num_rows:      buffer rows and tokens.
        num_heads:     of the prune layer.
        like:          a tensor [..., D] with the values' width, device and dtype.
    """

    def __init__(self, num_steps: int, num_sequences: int, num_rows: int, num_heads: int, like: Tensor) -> None:
        self.num_heads = num_heads
        self.previous = like.new_empty(num_sequences, num_rows, like.shape[-1])

    def begin(self, positions: Tensor) -> None:
        """Start a batch. Nothing to do: the first step is a refresh step, which fills `previous`."""

    @staticmethod
    def features(x: Tensor, keys_values: Tensor) -> Tensor:
        """Return the features [N, R, D] of N sequences that the rule compares.

        `x` [N, R, D] is the input of the prune layer, `keys_values` [N, R, 2D] are its keys and values.
        """
        return keys_values.chunk(2, dim=-1)[1]

    def scores(self, step: int, features: Tensor) -> Tensor:
        """Return a new tensor [N, R] with a score for each row."""
        dtype = torch.promote_types(features.dtype, torch.float32)  # similarities near 1 would tie in half precision
        now, before = (
            rows.to(dtype).unflatten(-1, (self.num_heads, -1)) for rows in (features, self.previous[: len(features)])
        )
        return F.cosine_similarity(now, before, dim=-1).mean(dim=-1)

    def remember(self, features: Tensor) -> None:
        """Store the features for the next step; a refresh step may bring more sequences than are stored."""
        stored = features[: len(self.previous)]
        self.previous[: len(stored)] = stored


class KeySimilarity(Similarity):
    """Compares keys."""

    @staticmethod
    def features(x: Tensor, keys_values: Tensor) -> Tensor:
        return keys_values.chunk(2, dim=-1)[0]


class OutputSimilarity(Similarity):
    """Compares the outputs of the block before."""

    @staticmethod
    def features(x: Tensor, keys_values: Tensor) -> Tensor:
        return x


class RandomScores(Similarity):
    """Scores rows at random, for the ablation that asks whether similarity matters. See `Similarity` for arguments.

    An image's scores depend on its order of prediction alone, not on its batch or the device.
    """

    def __init__(self, num_steps: int, num_sequences: int, num_rows: int, num_heads: int, like: Tensor) -> None:
        self.rankings = like.new_empty(num_steps, num_sequences, num_rows, dtype=torch.float32)

    def begin(self, positions: Tensor) -> None:
        """Draw a ranking of the rows for each step and image, given the positions [B, L] in order of prediction."""
        num_steps, num_sequences, num_rows = self.rankings.shape
        unshuffled = np.tile(np.arange(num_rows, dtype=np.float32), (num_steps, 1))
        rankings = [np.random.default_rng(order).permuted(unshuffled, axis=1) for order in positions.tolist()]
        branches = num_sequences // len(rankings)
        self.rankings.copy_(torch.from_numpy(np.stack(rankings * branches, axis=1)))

    def scores(self, step: int, features: Tensor) -> Tensor:
        """Return the step's ranking [N, R]."""
        return self.rankings[step, : len(features)].clone()

    def remember(self, features: Tensor) -> None:
        """Store nothing."""


RULES = {"similarity": Similarity, "keys": KeySimilarity, "outputs": OutputSimilarity, "random": RandomScores}
