"""The choices that depend on what is computed: rows that pass the prune layer, and tokens that are denoised longer."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.lazymar.plan import Plan, Step
from models.mar import MAR, Attention


class Similarity:
    """Ranks rows by the cosine similarity of their values at this step and the previous one, averaged over heads."""

    def __init__(self, model: MAR, num_sequences: int, num_rows: int) -> None:
        self.previous = model.mask_token.new_empty(num_sequences, num_rows, model.mask_token.shape[-1])

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept from one step to the next."""
        return [self.previous]

    def begin(self, positions: Tensor) -> None:
        """Take up a batch: the first step of a run is a refresh, which fills `previous`."""

    def scores(self, step: Step, attention: Attention, values: Tensor) -> Tensor:
        """Return the similarity [B, R] of each row, given the values [B, R, D] of the prune layer."""
        dtype = torch.promote_types(values.dtype, torch.float32)  # similarities near 1 would tie in half precision
        now, before = (attention.split_heads(rows.to(dtype)) for rows in (values, self.previous[: len(values)]))
        return F.cosine_similarity(now, before, dim=-1).mean(dim=-1)

    def remember(self, values: Tensor) -> None:
        """Keep the values for the next step, as far as there is room."""
        kept = values[: len(self.previous)]
        self.previous[: len(kept)] = kept


class Chance:
    """Ranks rows at random, for the ablation that asks whether similarity matters.

    An image's rankings depend on its order of prediction alone, not on its batch or the device.
    """

    def __init__(self, model: MAR, num_sequences: int, num_rows: int) -> None:
        self.rankings = model.mask_token.new_empty(model.seq_len, num_sequences, num_rows, dtype=torch.float32)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept from one step to the next."""
        return [self.rankings]

    def begin(self, positions: Tensor) -> None:
        """Draw a ranking of the rows for each image and each step, of which there are at most as many as tokens."""
        num_steps, num_sequences, num_rows = self.rankings.shape
        unshuffled = np.tile(np.arange(num_rows, dtype=np.float32), (num_steps, 1))
        rankings = [np.random.default_rng(order).permuted(unshuffled, axis=1) for order in positions.tolist()]
        branches = num_sequences // len(rankings)
        self.rankings.copy_(torch.from_numpy(np.stack(rankings * branches, axis=1)))

    def scores(self, step: Step, attention: Attention, values: Tensor) -> Tensor:
        """Return a copy of the step's ranking [B, R]."""
        return self.rankings[step.index, : len(values)].clone()

    def remember(self, values: Tensor) -> None:
        """Keep nothing."""


# By the names that `policy.SELECTIONS` lists.
RULES: dict[str, type[Similarity | Chance]] = {"similarity": Similarity, "random": Chance}


class RowSelection:
    """Chooses the rows that pass the prune layer: those with the lowest scores, and always the tokens in hand.

    These are the tokens predicted now, whose output is wanted, and those predicted at the previous step, which the
    decoder sees as known for the first time.
    """

    def __init__(self, model: MAR, plan: Plan, num_sequences: int) -> None:
        self.buffer_size = model.buffer_size
        self.rule = RULES[plan.selection](model, num_sequences, plan.num_rows)

    def begin(self, positions: Tensor) -> None:
        """Take up a batch, given the positions [B, L] of its tokens in the order of prediction."""
        self.rule.begin(positions)

    def __call__(self, step: Step, attention: Attention, values: Tensor) -> Tensor | None:
        """Return the rows [B, num_kept] to keep, `in_hand` first, given the prune layer's values of all rows [B, R, D].

        None stands for all rows.
        """
        rows = None
        if step.num_kept < values.shape[1]:
            scores = self.rule.scores(step, attention, values)
            in_hand = slice(self.buffer_size + step.previous, self.buffer_size + step.stop)
            scores[:, in_hand] = math.inf
            others = scores.topk(step.num_kept - (step.stop - step.previous), largest=False).indices
            first = torch.arange(in_hand.start, in_hand.stop, device=values.device).expand(len(values), -1)
            rows = torch.cat([first, others], dim=1)
        self.rule.remember(values)
        return rows

    @staticmethod
    def predicted_now(step: Step) -> slice:
        """Return where among the rows kept those of the tokens predicted now are: behind the previous step's."""
        return slice(step.start - step.previous, step.stop - step.previous)


def detail(conditions: Tensor) -> Tensor:
    """Return how detailed tokens are [B, k], by the conditional branch's conditions [B, k, D].

    It is the amplitude of the frequencies n = 1 to D / 2 of a condition over its channels, summed with weights that
    grow from 1 to 2 (GtR, arXiv 2510.17171; frequency-weighted token selection).
    """
    amplitudes = torch.fft.rfft(conditions.to(torch.promote_types(conditions.dtype, torch.float32))).abs()[..., 1:]
    count = amplitudes.shape[-1]
    weights = 1 + torch.arange(1, count + 1, device=conditions.device, dtype=amplitudes.dtype) / count
    return (amplitudes * weights).sum(dim=-1)
