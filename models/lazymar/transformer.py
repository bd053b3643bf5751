"""The transformer's part of a step: conditions for the tokens predicted now, from the tokens known so far.

The loops over blocks are MAR's own (`models/mar.py`). What LazyMAR adds is which rows they compute, as the plan says,
and where the keys and values of the other rows come from, which is the caches' affair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.lazymar.caches import (
    ALL,
    ConditionCache,
    NoConditionCache,
    NoTokenCache,
    RowCache,
    Rows,
    TokenCache,
    count_through,
    take,
)
from models.lazymar.plan import Plan, Step
from models.lazymar.selection import RowSelection
from models.mar import MAR


class Transformer:
    """Computes the conditions of a batch's steps, which come in order; holds the batch's caches.

    Everything that a batch brings is written in place, since captured steps read it where it was.

    Raises ValueError if the decoder has no block of the plan's `prune_layer`.
    """

    def __init__(self, model: MAR, plan: Plan, num_images: int) -> None:
        self.model, self.plan, self.num_images = model, plan, num_images
        num_sequences = plan.num_branches * num_images
        self.positions = torch.zeros(num_sequences, model.seq_len, dtype=torch.long, device=model.mask_token.device)
        self.class_embedding = model.fake_latent.repeat(num_sequences, 1)
        self.first_block = RowCache(4, num_sequences, plan.num_rows, model.mask_token)
        self.token_cache = NoTokenCache()
        if plan.prune_layer is not None:
            if plan.prune_layer >= len(model.decoder_blocks):
                raise ValueError(f"prune_layer must be below the decoder's {len(model.decoder_blocks)} blocks")
            self.token_cache = TokenCache(model, plan, num_images, plan.prune_layer)
        lazy_steps_need_it = plan.lazy_branches < plan.num_branches
        self.condition_cache = ConditionCache(model, num_images) if lazy_steps_need_it else NoConditionCache()

    def begin(self, class_labels: Tensor, positions: Tensor) -> None:
        """Take up a batch: its classes [B] and the positions [B, L] of its tokens, in the order of prediction.

        A saving without any loss: a row of the first decoder block depends on its token alone, and while that is masked
        on its position. So the block's input, queries, keys and values are computed once for all masked tokens, and
        later only where a row has changed.
        """
        self.positions.copy_(positions.repeat(self.plan.num_branches, 1))
        self.class_embedding[: self.num_images] = self.model.class_emb(class_labels)
        self.token_cache.begin(positions)
        block = self.model.decoder_blocks[0]
        x = self.model.masked_input(torch.arange(self.model.seq_len, device=self.positions.device))  # [L, D]
        masked = x, *block.attn.queries_keys_values(block.norm1(x))
        self.first_block.update(slice(self.model.buffer_size, None), *(rows[self.positions] for rows in masked))

    def __call__(self, step: Step, tokens: Tensor) -> Tensor:
        """Return the conditions of the k tokens predicted now, from all tokens [B, L, C] in the order of prediction.

        They are [B, k, D], or [2B, k, D] at a step under guidance, the conditional branch first.
        """
        return self.decode(step, self.encode(step, tokens))

    def encode(self, step: Step, tokens: Tensor) -> Tensor:
        """Return the encoder's output [B, P + n, D] for the buffer and the step's n new tokens."""
        positions = self._positions(step)
        new_tokens = tokens[:, step.new].repeat(step.num_branches, 1, 1)
        x = self.model.encoder_input(self.class_embedding[: len(positions)], new_tokens, positions[:, step.new])
        rows = self._changed_rows(step)
        for number, block in enumerate(self.model.encoder_blocks):
            queries, keys, values = block.attn.queries_keys_values(block.norm1(x))
            keys, values = self.token_cache.encoder_keys_values(number, step, rows, keys, values)
            x = block.finish(x, queries, keys, values)
        return self.model.encoder_norm(x)

    def decode(self, step: Step, encoded: Tensor) -> Tensor:
        """Return the step's conditions, from what `encode` has returned for it."""
        blocks, positions = self.model.decoder_blocks, self._positions(step)
        x = self.model.decoder_input(encoded, positions[:, step.new])
        changed = x, *blocks[0].attn.queries_keys_values(blocks[0].norm1(x))
        x, queries, keys, values = self.first_block.update(self._changed_rows(step), *changed)
        rows: Rows = ALL  # those that `x` holds
        for number, block in enumerate(blocks):
            if number > 0:
                queries, keys, values = block.attn.queries_keys_values(block.norm1(x))
            keys, values = self.token_cache.decoder_keys_values(number, rows, keys, values)
            going_on: Rows = ALL  # of the rows in `x`
            if block is blocks[-1]:
                going_on = self._read_rows(step, rows)
            elif number == self.plan.prune_layer:
                going_on = rows = self.token_cache.rows_going_on(step, block.attn, values)
            x = block.finish(take(x, going_on), take(queries, going_on), keys, values)
        decoded = self.condition_cache.complete(step, x)[: step.head.num_branches * self.num_images]
        return self.model.conditions(decoded, self.positions[: len(decoded), step.predicted])

    def _positions(self, step: Step) -> Tensor:
        """Return the positions [B, L] of the sequences that the step computes."""
        return self.positions[: step.num_branches * self.num_images]

    def _changed_rows(self, step: Step) -> Tensor:
        """Return the rows that the encoder computes: the buffer, and the step's new tokens."""
        numbers = torch.arange(self.plan.num_rows, device=self.positions.device)
        buffer, tokens = numbers.split([self.model.buffer_size, self.model.seq_len])
        rows = torch.cat([buffer, tokens[step.new]])
        return count_through(rows.expand(step.num_branches * self.num_images, -1), self.plan.num_rows)

    def _read_rows(self, step: Step, rows: Rows) -> slice:
        """Return where in `x`, which holds `rows`, those are whose output is read before the next refresh."""
        if isinstance(rows, slice):
            return slice(self.model.buffer_size + step.start, self.model.buffer_size + step.horizon)
        return RowSelection.predicted_now(step)
