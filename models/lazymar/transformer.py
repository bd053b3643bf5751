"""The transformer's part of a step: conditions for the tokens predicted now, from the tokens known so far.

The loops over blocks compute what `MAR.forward` computes (`models/mar.py`), on fewer rows: the plan says on how many,
and the keys and values of the other rows come from the token cache.
"""

import torch
from torch import Tensor

from models.lazymar.caches import ConditionCache, TokenCache, write_slices
from models.lazymar.plan import Plan, Step
from models.mar import MAR


class Transformer:
    """Computes the conditions of a batch's steps, in order; holds the batch's caches.

    Raises ValueError if the decoder has no block of the policy's `prune_layer`.
    """

    def __init__(self, model: MAR, plan: Plan, num_images: int) -> None:
        self.model, self.plan, self.num_images = model, plan, num_images
        num_sequences, width = plan.max_branches * num_images, model.mask_token.shape[-1]
        self.positions = torch.zeros(num_sequences, model.seq_len, dtype=torch.long, device=model.mask_token.device)
        self.class_embedding = model.fake_latent.repeat(num_sequences, 1)
        # The first decoder block's input, and its queries, keys and values, of all rows. A step overwrites those of the
        # rows that it has encoded, so that at a lazy step older tokens keep outdated ones.
        self.first_input = model.mask_token.new_empty(num_sequences, plan.num_rows, width)
        self.first_projections = model.mask_token.new_empty(num_sequences, plan.num_rows, 3 * width)
        self.token_cache = TokenCache(model, plan, num_images) if plan.policy.token_cache else None
        self.condition_cache = ConditionCache(model, num_images) if plan.policy.condition_cache else None

    def begin(self, class_labels: Tensor, positions: Tensor) -> None:
        """Start a batch of classes [B], whose tokens are at `positions` [B, L], in order of prediction.

        An exact optimization: while a token is masked, its row in the first decoder block depends on its position
        alone. So queries, keys and values of masked tokens are computed here; later, each step computes those of the
        rows that it has just encoded.
        """
        self.positions.copy_(positions.repeat(self.plan.max_branches, 1))
        self.class_embedding[: self.num_images] = self.model.class_emb(class_labels)
        if self.token_cache is not None:
            self.token_cache.rule.begin(positions)
        block = self.model.decoder_blocks[0]
        x = self.model.masked_input(torch.arange(self.model.seq_len, device=self.positions.device))  # [L, D]
        self.first_input[:, self.model.buffer_size :] = x[self.positions]
        self.first_projections[:, self.model.buffer_size :] = block.attn.qkv(block.norm1(x))[self.positions]

    def __call__(self, step: Step, tokens: Tensor) -> Tensor:
        """Return the conditions of the k tokens predicted now, from all tokens [B, L, C] in order of prediction.

        They are [B, k, D], or [2B, k, D] at a step with guidance, the conditional branch first.
        """
        positions = self.positions[: step.transformer_branches * self.num_images]
        decoded = self.decode(step, self.encode(step, tokens, positions), positions)
        if self.condition_cache is not None and step.transformer_branches == 2:
            self.condition_cache.store(step, decoded)
            decoded = decoded[:, : step.num_tokens]
        elif self.condition_cache is not None and step.cfg > 1:
            decoded = self.condition_cache.add_unconditional(step, decoded)
        if step.cfg == 1:  # it may have computed both branches for later, guided steps
            decoded = decoded[: self.num_images]
        return self.model.conditions(decoded, self.positions[: len(decoded), step.predicted])

    def encode(self, step: Step, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the encoder's output [N, P + n, D] for the buffer and the n tokens `step.encoded`."""
        encoded = tokens[:, step.encoded].repeat(step.transformer_branches, 1, 1)
        x = self.model.encoder_input(self.class_embedding[: len(positions)], encoded, positions[:, step.encoded])
        for number, block in enumerate(self.model.encoder_blocks):
            queries, keys_values = block.attn.project(block.norm1(x))
            if self.token_cache is not None:
                known = self.token_cache.encoder[number].write_known(step, keys_values)  # may hold fewer sequences
                keys_values = known if step.reuses_tokens else keys_values
            x = block.finish(x, queries, keys_values)
        return self.model.encoder_norm(x)

    def decode(self, step: Step, encoded: Tensor, positions: Tensor) -> Tensor:
        """Return the last block's output for the tokens predicted now, and up to `step.output_stop`."""
        model, cache, blocks = self.model, self.token_cache, self.model.decoder_blocks
        x = model.decoder_input(encoded, positions[:, step.encoded])
        projections = blocks[0].attn.qkv(blocks[0].norm1(x))
        write_slices(self.first_input, model.buffer_size, step.encoded, x)
        write_slices(self.first_projections, model.buffer_size, step.encoded, projections)
        x = self.first_input[: len(positions)]
        queries, keys_values = blocks[0].attn.split(self.first_projections[: len(positions)])

        needed = slice(model.buffer_size + step.start, model.buffer_size + step.output_stop)  # of the rows that x holds
        chosen = None  # flat indices of the rows that x holds; None: all rows
        for number, block in enumerate(blocks):
            if number > 0:
                queries, keys_values = block.attn.project(block.norm1(x))
            if cache is not None and number in cache.decoder:
                if chosen is None:
                    cache.decoder[number].write_all(keys_values)
                else:
                    keys_values = cache.decoder[number].write_recomputed(chosen, keys_values)
            if number == len(blocks) - 1:
                x, queries = x[:, needed], queries[:, needed]
            elif cache is not None and number == self.plan.policy.prune_layer:
                features = cache.rule.features(x, keys_values)
                if step.num_recomputed < self.plan.num_rows:
                    chosen = cache.flat_indices(cache.choose_rows(step, features))
                    x, queries = take_rows(x, chosen), take_rows(queries, chosen)
                    needed = slice(step.start - step.previous_start, step.output_stop - step.previous_start)
                cache.rule.remember(features)
            x = block.finish(x, queries, keys_values)
        return x


def take_rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Return rows [N, n, D] of `x` [N, R, D] at flat indices `chosen` [N * n]."""
    return x.flatten(0, 1).index_select(0, chosen).unflatten(0, (len(x), -1))
