"""The token cache and the condition cache: what is stored, when, and what comes back.

Each has an empty counterpart for runs without it, which hands its arguments through: one loop serves all runs. The
head cache is in `head.py`, beside the only loop that uses it.

A batch of B images is computed as B sequences per branch, those of the conditional branch first. A cache that holds
fewer branches than a step computes keeps the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

from models.lazymar.plan import Plan, Step
from models.lazymar.selection import RowSelection
from models.mar import MAR, Attention

# Some rows of [B, R, D]: the same slice for every sequence, or their numbers when all B * R rows are counted through,
# the same number of rows for each sequence and sequence after sequence.
Rows = Union[slice, Tensor]
ALL = slice(None)


def take(x: Tensor, rows: Rows) -> Tensor:
    """Return the given rows [B, n, D] of `x` [B, R, D]."""
    if isinstance(rows, slice):
        return x[:, rows]
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x), -1))


def count_through(rows: Tensor, num_rows: int) -> Tensor:
    """Return row numbers [B, n] of each sequence as numbers [B * n] among all B * num_rows rows."""
    return (rows + num_rows * torch.arange(len(rows), device=rows.device)[:, None]).flatten()


class RowCache:
    """Tensors of all rows, [B, num_rows, D] each, of which every step writes those that it has computed."""

    def __init__(self, count: int, num_sequences: int, num_rows: int, like: Tensor) -> None:
        """Make room for `count` tensors, as wide as `like` [..., D] and of its device and dtype."""
        self.tensors = [like.new_empty(num_sequences, num_rows, like.shape[-1]) for _ in range(count)]

    def update(self, rows: Rows, *new: Tensor) -> list[Tensor]:
        """Write new rows into each tensor, as far as its sequences go; return the tensors, cut to those of `new`."""
        whole = [cached[: len(source)] for cached, source in zip(self.tensors, new)]
        for cached, source in zip(whole, new):
            source = source[: len(cached)]
            if isinstance(rows, slice):
                cached[:, rows] = source
            else:
                cached.flatten(0, 1).index_copy_(0, rows, source.flatten(0, 1))
        return whole


class NoTokenCache:
    """The empty token cache: every step computes all rows."""

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept from one step to the next."""
        return []

    def begin(self, positions: Tensor) -> None:
        """Take up a batch."""

    def encoder_keys_values(
        self, number: int, step: Step, rows: Rows, keys: Tensor, values: Tensor
    ) -> Sequence[Tensor]:
        """Return the keys and values to attend to."""
        return keys, values

    def decoder_keys_values(self, number: int, rows: Rows, keys: Tensor, values: Tensor) -> Sequence[Tensor]:
        """Return the keys and values to attend to."""
        return keys, values

    def rows_going_on(self, step: Step, attention: Attention, values: Tensor) -> Rows:
        """Return all rows."""
        return ALL


class TokenCache(NoTokenCache):
    """The paper's token cache: features of tokens that hardly change from one step to the next.

    A refresh computes everything and leaves here

    - the keys and values of every encoder block, for the buffer and the known tokens;
    - the keys and values of the decoder blocks behind the prune layer, for all rows.

    A lazy step computes, and writes over, the rows that matter to it, and attends to all of them:

    - in the encoder, the buffer and the tokens predicted at the previous step;
    - in the decoder all rows up to the attention of the prune layer, and behind it those that `RowSelection` chooses
      there, since the values of the others have hardly changed.
    """

    def __init__(self, model: MAR, plan: Plan, num_images: int, prune_layer: int) -> None:
        num_sequences, num_rows = plan.lazy_branches * num_images, plan.num_rows
        self.buffer_size = model.buffer_size
        self.encoder_rows = [RowCache(2, num_sequences, num_rows, model.fake_latent) for _ in model.encoder_blocks]
        behind = range(prune_layer + 1, len(model.decoder_blocks))
        self.decoder_rows = {number: RowCache(2, num_sequences, num_rows, model.mask_token) for number in behind}
        self.selection = RowSelection(model, plan, num_sequences)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept from one step to the next."""
        holders = [*self.encoder_rows, *self.decoder_rows.values(), self.selection.rule]
        return [tensor for holder in holders for tensor in holder.tensors]

    def begin(self, positions: Tensor) -> None:
        """Take up a batch, given the positions [B, L] of its tokens in the order of prediction."""
        self.selection.begin(positions)

    def encoder_keys_values(
        self, number: int, step: Step, rows: Rows, keys: Tensor, values: Tensor
    ) -> Sequence[Tensor]:
        """Store an encoder block's keys and values of `rows`; return those of all known rows."""
        if not step.reuses_tokens:
            self.encoder_rows[number].update(slice(keys.shape[1]), keys, values)
            return keys, values
        num_known = self.buffer_size + step.start
        return [cached[:, :num_known] for cached in self.encoder_rows[number].update(rows, keys, values)]

    def decoder_keys_values(self, number: int, rows: Rows, keys: Tensor, values: Tensor) -> Sequence[Tensor]:
        """Store a decoder block's keys and values of `rows`; return those of all rows.

        Up to the prune layer every step computes all rows, so that there is nothing to store.
        """
        if number not in self.decoder_rows:
            return keys, values
        cached = self.decoder_rows[number].update(rows, keys, values)
        return (keys, values) if isinstance(rows, slice) else cached

    def rows_going_on(self, step: Step, attention: Attention, values: Tensor) -> Rows:
        """Return the rows that pass the prune layer, given its values of all rows."""
        kept = self.selection(step, attention, values)
        return ALL if kept is None else count_through(kept, values.shape[1])


class NoConditionCache:
    """The empty condition cache: every step computes all branches."""

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept from one step to the next."""
        return []

    def complete(self, step: Step, decoded: Tensor) -> Tensor:
        """Return the last block's output for the tokens predicted now, of all branches."""
        return decoded


class ConditionCache(NoConditionCache):
    """The paper's condition cache: how the unconditional branch differs from the conditional one changes slowly.

    A refresh stores the difference of the last block's outputs, unconditional - conditional, for the tokens predicted
    before the next refresh. A lazy step computes the conditional branch alone and adds the difference to it.
    """

    def __init__(self, model: MAR, num_images: int) -> None:
        self.difference = model.mask_token.new_empty(num_images, model.seq_len, model.mask_token.shape[-1])

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is kept from one step to the next."""
        return [self.difference]

    def complete(self, step: Step, decoded: Tensor) -> Tensor:
        """Return the last block's output [2B, k, D] for the k tokens predicted now; [B, k, D] if none is guided.

        `decoded` is [2B, horizon - start, D] at a refresh and [B, k, D] at a lazy step.
        """
        if step.num_branches == 2:
            conditional, unconditional = decoded.chunk(2)
            self.difference[:, step.start : step.horizon] = unconditional - conditional
            return decoded[:, : step.num_tokens]
        if step.head.num_branches == 1:
            return decoded
        return torch.cat([decoded, decoded + self.difference[:, step.predicted]])
