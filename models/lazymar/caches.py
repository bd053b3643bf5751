"""The token cache and the condition cache. The head cache is in `head.py`, beside the only loop that uses it.

A batch of B images is computed as N sequences: one per image and branch, those of the conditional branch first. A cache
that holds fewer sequences than a step computes stores the first ones.

Everything is written in place, because captured CUDA graphs read it at a fixed address.
"""

import math

import torch
from torch import Tensor

from models.lazymar.plan import Plan, Step
from models.lazymar.selection import RULES
from models.mar import MAR


class KeyValueCache:
    """Keys and values of all rows of one transformer block, side by side in one tensor [N, R, 2D]."""

    def __init__(self, num_sequences: int, num_rows: int, buffer_size: int, like: Tensor) -> None:
        self.buffer_size = buffer_size
        self.rows = like.new_empty(num_sequences, num_rows, 2 * like.shape[-1])

    def write_known(self, step: Step, new: Tensor) -> Tensor:
        """Write rows [N, P + n, 2D] of the buffer and the encoded tokens; return the buffer's and all known tokens'."""
        write_slices(self.rows, self.buffer_size, step.encoded, new)
        return self.rows[: len(new), : self.buffer_size + step.start]

    def write_all(self, new: Tensor) -> None:
        """Overwrite all rows of the sequences in `new` [N, R, 2D]."""
        written = self.rows[: len(new)]
        written.copy_(new[: len(written)])

    def write_recomputed(self, chosen: Tensor, new: Tensor) -> Tensor:
        """Write rows [N, n, 2D] at flat indices `chosen` [N * n]; return all rows of these sequences."""
        rows = self.rows[: len(new)]
        rows.flatten(0, 1).index_copy_(0, chosen, new.flatten(0, 1))
        return rows


class TokenCache:
    """The paper's token cache: features of most tokens hardly change from one step to the next.

    A refresh step computes all rows and leaves their keys and values here: in every encoder block those of the buffer
    and the known tokens, in the decoder blocks after the prune layer those of all rows. A lazy step computes only some
    rows, which overwrite their cached keys and values and attend to those of all:

    - in the encoder the buffer and the tokens predicted at the step before;
    - in the decoder all rows up to the keys and values of the prune layer, where nothing is cached, and from its
      attention on the rows that `choose_rows` returns.

    The decoder's input of older tokens stays as it was, too: it is in `Transformer.first_input`.
    """

    def __init__(self, model: MAR, plan: Plan, num_images: int) -> None:
        policy, num_sequences = plan.policy, plan.lazy_branches * num_images
        if policy.prune_layer >= len(model.decoder_blocks):
            raise ValueError(f"prune_layer must be below the decoder's {len(model.decoder_blocks)} blocks")
        shape = num_sequences, plan.num_rows, model.buffer_size
        self.buffer_size, self.num_rows = model.buffer_size, plan.num_rows
        self.encoder = [KeyValueCache(*shape, model.fake_latent) for _ in model.encoder_blocks]
        after_pruning = range(policy.prune_layer + 1, len(model.decoder_blocks))
        self.decoder = {number: KeyValueCache(*shape, model.mask_token) for number in after_pruning}
        num_heads = model.decoder_blocks[policy.prune_layer].attn.num_heads
        self.rule = RULES[policy.selection](len(plan), num_sequences, plan.num_rows, num_heads, model.mask_token)

    def choose_rows(self, step: Step, features: Tensor) -> Tensor:
        """Choose the rows to recompute, given the rule's features of all rows [N, R, D].

        Returns row numbers [N, num_recomputed]: first the tokens from `step.previous_start` on, which the decoder sees
        as known for the first time, then those whose output is needed, up to `step.output_stop`, then the rows that the
        rule scores lowest.
        """
        scores = self.rule.scores(step.index, features)
        first, last = self.buffer_size + step.previous_start, self.buffer_size + step.output_stop
        scores[:, first:last] = math.inf
        others = scores.topk(step.num_recomputed - (last - first), largest=False).indices
        always = torch.arange(first, last, device=features.device).expand(len(features), -1)
        return torch.cat([always, others], dim=1)

    def flat_indices(self, rows: Tensor) -> Tensor:
        """Return row numbers [N, n] as flat indices [N * n] into the N * R rows of all sequences."""
        offsets = self.num_rows * torch.arange(len(rows), device=rows.device)
        return (rows + offsets[:, None]).flatten()


class ConditionCache:
    """The paper's condition cache: the two branches of guidance differ by nearly the same at successive steps.

    A step that computes both branches, such as a refresh step, stores the difference of the last block's outputs,
    unconditional - conditional, for the tokens predicted from this step until the next such step. The steps between
    compute the conditional branch and add the difference to it.
    """

    def __init__(self, model: MAR, num_images: int) -> None:
        self.difference = model.mask_token.new_empty(num_images, model.seq_len, model.mask_token.shape[-1])

    def store(self, step: Step, decoded: Tensor) -> None:
        """Store the difference of both branches' output [2B, output_stop - start, D]."""
        conditional, unconditional = decoded.chunk(2)
        self.difference[:, step.start : step.output_stop] = unconditional - conditional

    def add_unconditional(self, step: Step, decoded: Tensor) -> Tensor:
        """Return both branches [2B, k, D] for a lazy step's conditional output [B, k, D]."""
        return torch.cat([decoded, decoded + self.difference[:, step.predicted]])


def write_slices(rows: Tensor, buffer_size: int, tokens: slice, new: Tensor) -> None:
    """Write `new` [N, P + n, D], the buffer and the n given tokens, into `rows` [N, P + L, D].

    Sequences that `rows` has no room for are dropped. All sequences write to the same two slices.
    """
    new = new[: len(rows)]
    known = rows[: len(new), buffer_size + tokens.start : buffer_size + tokens.stop]
    rows[: len(new), :buffer_size] = new[:, :buffer_size]
    known.copy_(new[:, buffer_size:])
