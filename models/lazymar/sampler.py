"""Sampling with MAR, in full or with LazyMAR's caches: the method, in one file.

A run's plan (`plan.py`) is known before its first step, because the order of prediction is drawn up front. The sampler
keeps all tokens in that order, so every set of rows that a step needs, known tokens, those predicted last, now and
next, is a slice. Rows are [buffer | tokens]: P buffer rows, then L tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.lazymar.head import HeadSampler
from models.lazymar.plan import CachePolicy, Step, make_plan
from models.lazymar.runtime import CudaRecorder, Recorded, Recorder, RecordingError
from models.mar import MAR, Block

# Raised by hand when the same settings, weights and seed come to give other images, by more than rounding: a run that
# was begun with another version is then not continued. `tests/test_sampling.py` holds fingerprints that tell when.
SAMPLER_VERSION = 1

Rows = Union[slice, Tensor]  # rows of [B, R, D]: the same slice for all B, or flat numbers (b * R + row), B * n of them


class Noise(Protocol):
    """Where a run's randomness comes from.

    orders: LongTensor [B, L], each row a permutation; tokens are predicted from its end to its beginning.
    """

    orders: Tensor

    def draw(self, step: int, num_tokens: int) -> Tensor:
        """[num_sampling_steps + 1, B, num_tokens, C] for a step's tokens, ascending: the start, then per step."""


class ImageNoise:
    """Noise that depends on each image's seed alone: not on its batch, its place in it, or the number of processes.

    Args:
        model:              the network to be sampled from.
        seed:               of the run.
        indices:            [B] numbers of the images, at least 0.
        num_sampling_steps: of the diffusion head.
        device:             where noise is drawn; another kind of device draws other noise from the same seed.
    """

    def __init__(
        self,
        model: MAR,
        seed: int,
        indices: Sequence[int],
        num_sampling_steps: int = 100,
        device: torch.device | str = "cpu",
    ) -> None:
        self.token_dim, self.num_draws, self.device = model.token_dim, num_sampling_steps + 1, torch.device(device)
        # One seed for the order, then one per autoregressive step, of which there are at most as many as tokens.
        seeds = [
            np.random.SeedSequence([seed, int(index)]).generate_state(1 + model.seq_len, "u8") for index in indices
        ]
        self.step_seeds = [[int(value >> np.uint64(1)) for value in row] for row in seeds]
        generator = torch.Generator()
        self.orders = torch.stack(
            [torch.randperm(model.seq_len, generator=generator.manual_seed(row[0])) for row in self.step_seeds]
        )

    def draw(self, step: int, num_tokens: int) -> Tensor:
        noise = torch.empty(self.num_draws, len(self.step_seeds), num_tokens, self.token_dim, device=self.device)
        generator = torch.Generator(self.device)
        for image, seeds in enumerate(self.step_seeds):
            generator.manual_seed(seeds[1 + step])
            shape = (self.num_draws, num_tokens, self.token_dim)
            noise[:, image] = torch.randn(shape, generator=generator, device=self.device)
        return noise


# Rows and their caches


def take(x: Tensor, rows: Rows) -> Tensor:
    """The given rows of `x` [B, R, D]."""
    if isinstance(rows, slice):
        return x[:, rows]
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x), -1))


def flat_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Row numbers [B, n] as numbers over all B * num_rows rows."""
    return (rows + num_rows * torch.arange(len(rows), device=rows.device)[:, None]).flatten()


def random_scores(positions: Tensor, num_rows: int) -> Tensor:
    """[steps, B, num_rows]: for each step, of which there are at most as many as tokens, each image's rows in a random
    ranking, which depends on the order of prediction, `positions` [B, L], alone: not on the batch or the device."""
    unshuffled = np.tile(np.arange(num_rows, dtype=np.float32), (positions.shape[1], 1))
    rankings = [np.random.default_rng(order).permuted(unshuffled, axis=1) for order in positions.tolist()]
    return torch.from_numpy(np.stack(rankings, axis=1)).to(positions.device)


class RowCache:
    """Rows that outlive their step: tensors [B, num_rows, D], written where they changed."""

    def __init__(self, count: int, like: Tensor, num_rows: int) -> None:
        self.tensors = [like.new_empty(len(like), num_rows, like.shape[-1]) for _ in range(count)]

    def update(self, rows: Rows, *new: Tensor) -> list[Tensor]:
        """Write one tensor of new rows into each cached one; returns these, of as many sequences, whole."""
        whole = [cached[: len(source)] for cached, source in zip(self.tensors, new)]
        for cached, source in zip(whole, new):
            if isinstance(rows, slice):
                cached[:, rows] = source
            else:
                cached.flatten(0, 1).index_copy_(0, rows, source.flatten(0, 1))
        return whole


class TokenCache:
    """What the transformer's steps pass on about tokens, for the halves that lazy steps compute.

    encoder: per block, keys and values.
    decoder: per block behind the prune layer, by its number, keys and values.
    values:  the prune layer's values at the previous step.
    """

    def __init__(self, model: MAR, num_sequences: int, prune_layer: int) -> None:
        num_rows = model.buffer_size + model.seq_len
        encoder_rows = model.fake_latent.expand(num_sequences, 1, -1)
        decoder_rows = model.mask_token.expand(num_sequences, 1, -1)
        self.encoder = [RowCache(2, encoder_rows, num_rows) for _ in model.encoder_blocks]
        behind = range(prune_layer + 1, len(model.decoder_blocks))
        self.decoder = {number: RowCache(2, decoder_rows, num_rows) for number in behind}
        self.values: Tensor | None = None


class ConditionCache(NamedTuple):
    """The last block's output difference [B, n, D], unconditional - conditional, for the tokens from `start` on."""

    start: int
    difference: Tensor


class Transformer:
    """Computes the conditions of each step in turn, from the tokens known so far."""

    def __init__(self, model: MAR, num_images: int, guided: bool, policy: CachePolicy | None) -> None:
        self.model, self.policy, self.num_images = model, policy, num_images
        self.halves = 2 if guided else 1
        self.num_rows = model.buffer_size + model.seq_len
        num_sequences = self.halves * num_images
        # All that a batch brings is written in place: recorded steps read it there.
        self.positions = torch.zeros(num_sequences, model.seq_len, dtype=torch.long, device=model.mask_token.device)
        self.class_embedding = model.fake_latent.repeat(num_sequences, 1)
        self.decoder_input = RowCache(4, model.mask_token.expand(num_sequences, 1, -1), self.num_rows)

        self.lazy_halves = 1 if policy is not None and policy.condition_cache else self.halves
        self.condition_cache: ConditionCache | None = None
        self.token_cache: TokenCache | None = None
        if policy is not None and policy.token_cache:
            if policy.prune_layer >= len(model.decoder_blocks):
                raise ValueError(f"prune_layer must be below the decoder's {len(model.decoder_blocks)} blocks")
            self.token_cache = TokenCache(model, self.lazy_halves * num_images, policy.prune_layer)
            if policy.selection == "random":
                self.random_scores = self.positions.new_empty(model.seq_len, num_images, self.num_rows).float()

    def begin(self, class_labels: Tensor, positions: Tensor) -> None:
        """Take up a batch: its classes [B] and the positions [B, L] of its tokens, in the order of prediction.

        The first decoder block's input, queries, keys and values are computed for masked tokens, where they depend on
        the position alone; a row's are computed again only when it changes.
        """
        self.positions.copy_(positions.repeat(self.halves, 1))
        self.class_embedding[: self.num_images] = self.model.class_emb(class_labels)
        if self.policy is not None and self.policy.token_cache and self.policy.selection == "random":
            self.random_scores.copy_(random_scores(positions, self.num_rows))
        block = self.model.decoder_blocks[0]
        x = self.model.masked_input(torch.arange(self.model.seq_len, device=self.positions.device))  # [L, D]
        projections = block.attn.queries_keys_values(block.norm1(x))
        tokens = slice(self.model.buffer_size, self.num_rows)
        self.decoder_input.update(tokens, *(rows[self.positions] for rows in (x, *projections)))

    def __call__(self, step: Step, tokens: Tensor) -> Tensor:
        """Conditions [B, k, D], or [2B, k, D] under guidance (conditional half first), of the step's k tokens."""
        return self.decode(step, self.encode(step, tokens))

    def encode(self, step: Step, tokens: Tensor) -> Tensor:
        """The encoder's output at the buffer and the step's new tokens, from all tokens [B, L, C]."""
        new, sequences, changed = self._new_tokens(step)
        new_tokens = tokens[:, new].repeat(len(sequences) // self.num_images, 1, 1)
        x = self.model.encoder_input(self.class_embedding[: len(sequences)], new_tokens, sequences[:, new])
        num_known = self.model.buffer_size + step.start
        for number, block in enumerate(self.model.encoder_blocks):
            queries, *keys_values = block.attn.queries_keys_values(block.norm1(x))
            if self._reuses_tokens(step):
                cached = self.token_cache.encoder[number].update(changed, *keys_values)
                keys_values = [rows[:, :num_known] for rows in cached]
            elif self.token_cache is not None:
                self.token_cache.encoder[number].update(slice(num_known), *map(self._cached, keys_values))
            x = block.finish(x, queries, *keys_values)
        return self.model.encoder_norm(x)

    def decode(self, step: Step, encoded: Tensor) -> Tensor:
        """The step's conditions, from what `encode` returned for it."""
        new, sequences, changed = self._new_tokens(step)
        block = self.model.decoder_blocks[0]
        x = self.model.decoder_input(encoded, sequences[:, new])
        x, *projections = self.decoder_input.update(changed, x, *block.attn.queries_keys_values(block.norm1(x)))
        decoded = self._both_halves(step, self._decoder_blocks(step, x, projections))
        return self.model.conditions(decoded, self.positions[:, step.start : step.stop])

    def _reuses_tokens(self, step: Step) -> bool:
        return not step.refresh and self.token_cache is not None

    def _new_tokens(self, step: Step) -> tuple[slice, Tensor, Tensor]:
        """What a step computes: the tokens that are new to the network, the positions [B or 2B, L] of the sequences it
        runs, and the flat numbers of the rows that change, which are those of the buffer and the new tokens."""
        new = slice(step.previous if self._reuses_tokens(step) else 0, step.start)
        sequences = self.positions[: (self.halves if step.refresh else self.lazy_halves) * self.num_images]
        row_numbers = torch.arange(self.num_rows, device=sequences.device)
        buffer, tokens = row_numbers.split([self.model.buffer_size, self.model.seq_len])
        changed = torch.cat([buffer, tokens[new]])
        return new, sequences, flat_rows(changed.expand(len(sequences), -1), self.num_rows)

    def _cached(self, x: Tensor) -> Tensor:
        """The sequences of `x` whose rows lazy steps go on from."""
        return x[: self.lazy_halves * self.num_images]

    def _decoder_blocks(self, step: Step, x: Tensor, projections: Sequence[Tensor]) -> Tensor:
        """The last block's output at the rows that are read before the next refresh, [B, horizon - start, D].

        `x` and `projections` are the first block's input and its queries, keys and values, all rows of them.
        """
        blocks, cache = self.model.decoder_blocks, self.token_cache
        first_token = self.model.buffer_size
        read: Rows = slice(first_token + step.start, first_token + step.horizon)
        kept: Rows | None = None  # the rows of x, once pruned
        prunes = step.num_kept < self.num_rows

        for number, block in enumerate(blocks):
            at_prune_layer = cache is not None and number == self.policy.prune_layer
            narrows = (at_prune_layer and prunes) or block is blocks[-1]
            if number > 0:
                normed = block.norm1(x)
                if narrows:  # only some rows go on: queries are computed when these are known
                    projections = [None, *block.attn.keys_values(normed)]
                else:
                    projections = block.attn.queries_keys_values(normed)
            queries, *keys_values = projections

            rows: Rows | None = None
            if at_prune_layer:
                values = self._cached(keys_values[1])
                if prunes:
                    kept = rows = self._select_rows(step, block, values)
                self.token_cache.values = values.clone()  # the first block's are a cache that the next step overwrites
            elif cache is not None and number > self.policy.prune_layer:
                if kept is not None:
                    keys_values = cache.decoder[number].update(kept, *keys_values)
                else:
                    cache.decoder[number].update(slice(None), *map(self._cached, keys_values))
            if block is blocks[-1]:
                rows = read if kept is None or rows is kept else slice(step.stop - step.start)
            if rows is not None:
                x = take(x, rows)
                queries = take(queries, rows) if queries is not None else block.attn.queries(take(normed, rows))
            x = block.finish(x, queries, *keys_values)
        return x

    def _select_rows(self, step: Step, block: Block, values: Tensor) -> Tensor:
        """Flat numbers of the rows to keep: those predicted now, at the previous step, and the least similar others.

        Similarity is the cosine between a row's value now and at the previous step, averaged over heads; chance takes
        its place if the policy says so.
        """
        first_token = self.model.buffer_size
        if self.policy.selection == "random":
            similarity = self.random_scores[step.index].repeat(self.lazy_halves, 1)
        else:
            dtype = torch.promote_types(values.dtype, torch.float32)  # similarities near 1 would tie in half precision
            now, before = (block.attn.split_heads(rows.to(dtype)) for rows in (values, self.token_cache.values))
            similarity = F.cosine_similarity(now, before, dim=-1).mean(dim=-1)  # [B, R]
        always = slice(first_token + step.previous, first_token + step.stop)
        similarity[:, always] = math.inf
        others = similarity.topk(step.num_kept - (always.stop - always.start), largest=False).indices
        numbers = torch.arange(always.start, always.stop, device=values.device).roll(step.stop - step.start)
        return flat_rows(torch.cat([numbers.expand(len(values), -1), others], dim=1), self.num_rows)

    def _both_halves(self, step: Step, decoded: Tensor) -> Tensor:
        """The step's rows of `decoded`, the unconditional half from the condition cache where it was not computed."""
        num_tokens = step.stop - step.start
        if self.lazy_halves == self.halves:
            return decoded[:, :num_tokens]
        if step.refresh:
            conditional, unconditional = decoded.chunk(2)
            self.condition_cache = ConditionCache(step.start, unconditional - conditional)
            return decoded[:, :num_tokens]
        start, difference = self.condition_cache
        return torch.cat([decoded, decoded + difference[:, step.start - start : step.stop - start]])


# The loop


class SampledStep(NamedTuple):
    """A finished step: its plan, conditions ([2B or B, k, D], ascending positions) and the tokens [B, k, C] it made.

    They hold until the next step overwrites them.
    """

    step: Step
    conditions: Tensor
    tokens: Tensor


class Sampler:
    """Samples batch after batch with the same settings; what these have in common is computed once.

    On a GPU the first batch runs as it stands, the next one of its size is recorded as CUDA graphs, and later ones
    replay them. Where that fails, all run as they stand, with a warning.

    Args:
        model:              the network; its device and dtype are used.
        num_iter:           autoregressive steps, 1 to the number of tokens.
        cfg, cfg_schedule:  guidance scale (1: none) and "linear" or "constant".
        temperature:        scales the noise of the diffusion steps.
        num_sampling_steps: of the diffusion head, 2 to 1000.
        cache:              LazyMAR's policy, or None for the baseline.
        cuda_graphs:        whether to record them, on a GPU.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        model: MAR,
        *,
        num_iter: int = 64,
        cfg: float = 3.25,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
        num_sampling_steps: int = 100,
        cache: CachePolicy | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, not {temperature}")
        self.model, self.cache, self.num_sampling_steps = model, cache, num_sampling_steps
        self.device = model.mask_token.device
        self.dtype = torch.promote_types(model.mask_token.dtype, torch.float32)
        self.guided = cfg != 1
        self.plan = make_plan(model.seq_len, model.buffer_size, num_iter, cfg, cfg_schedule, cache)
        with torch.inference_mode():
            self.guidance = torch.tensor([step.cfg - 1 for step in self.plan], dtype=self.dtype, device=self.device)
            self.head = HeadSampler(model.diffloss.net, num_sampling_steps, temperature, self.guided, cache, self.dtype)
        self.record: Callable[[], Recorder] | None = (
            partial(CudaRecorder, self.device) if cuda_graphs and self.device.type == "cuda" else None
        )
        self.batches: _Batches | None = None  # of the size seen last

    def __call__(
        self,
        class_labels: Tensor,
        noise: Noise | None = None,
        on_step: Callable[[Step], object] | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] for classes [B], at unit scale (`model.latent_scale` times the VAE's).

        float64 for a float64 model, otherwise float32. `noise` is the source of randomness: `ImageNoise` of seed 0 and
        images 0..B-1 if None. `on_step` is called with each step once it has been handed to the device. Raises
        ValueError for an argument of the wrong shape or range, naming it.
        """
        try:
            return self._sample(class_labels, noise, on_step)
        except RecordingError as error:
            warnings.warn(f"CUDA graphs are not used, because recording them failed: {error}", stacklevel=2)
        self.record, self.batches = None, None
        return self._sample(class_labels, noise, on_step)

    def _sample(self, class_labels: Tensor, noise: Noise | None, on_step: Callable[[Step], object] | None) -> Tensor:
        side = self.model.grid_size * self.model.patch_size
        shape = (len(class_labels), self.model.vae_embed_dim, side, side)
        latents = torch.empty(shape, dtype=self.dtype, device=self.device)
        for sampled in self.steps(class_labels, noise, latents):
            if on_step is not None:
                on_step(sampled.step)
        return latents

    def steps(self, class_labels: Tensor, noise: Noise | None, latents: Tensor) -> Iterator[SampledStep]:
        """Like a call, one step at a time; `latents` is filled when the last step is done."""
        model = self.model
        if class_labels.ndim != 1 or len(class_labels) < 1 or class_labels.is_floating_point():
            raise ValueError("class_labels must be a LongTensor [B] of at least one label")
        if int(class_labels.min()) < 0 or int(class_labels.max()) >= model.class_num:
            raise ValueError(f"class_labels must be from 0 to {model.class_num - 1}")
        if noise is None:
            noise = ImageNoise(model, 0, range(len(class_labels)), self.num_sampling_steps, self.device)
        if noise.orders.shape != (len(class_labels), model.seq_len):
            raise ValueError(
                f"noise.orders must be [{len(class_labels)}, {model.seq_len}] for these class_labels and this model, "
                f"not {list(noise.orders.shape)}"
            )
        with torch.inference_mode():
            yield from self._steps(class_labels.to(self.device), noise, latents)

    def _steps(self, class_labels: Tensor, noise: Noise, latents: Tensor) -> Iterator[SampledStep]:
        model = self.model
        # Tokens in the order of prediction, those of one step in ascending position.
        order = noise.orders.to(self.device).flip(1)
        positions = torch.cat([order[:, step.start : step.stop].sort(dim=1).values for step in self.plan], dim=1)
        tokens = torch.zeros(*positions.shape, model.token_dim, dtype=self.dtype, device=self.device)

        if self.batches is None or self.batches.size != len(positions):
            self.batches = None  # its memory is free before the next ones take theirs
            self.batches = _Batches(self, len(positions))
        batches = self.batches
        batches.transformer.begin(class_labels, positions)
        for step in self.plan:
            num_tokens = step.stop - step.start
            draws = noise.draw(step.index, num_tokens).to(self.device, self.dtype)
            shape = (self.num_sampling_steps + 1, len(positions), num_tokens, model.token_dim)
            if draws.shape != shape:
                raise ValueError(f"noise.draw must return {list(shape)} here, not {list(draws.shape)}")
            conditions = batches.conditions(step, tokens)
            sampled = batches.sample(conditions.flatten(0, 1), draws.flatten(1, 2), self.guidance[step.index])
            tokens[:, step.start : step.stop] = sampled.unflatten(0, (-1, num_tokens))
            yield SampledStep(step, conditions, tokens[:, step.start : step.stop])
        batches.begin_recording()
        in_raster_order = torch.empty_like(tokens).scatter_(1, positions[..., None].expand_as(tokens), tokens)
        latents.copy_(model.unpatchify(in_raster_order))


class _Batches:
    """What the batches of one size share: the transformer's state and, once recorded, its steps and the head's runs."""

    def __init__(self, sampler: Sampler, size: int) -> None:
        self.size, self.head, self.record = size, sampler.head, sampler.record
        self.transformer = Transformer(sampler.model, size, sampler.guided, sampler.cache)
        weight_dtype = sampler.model.mask_token.dtype
        # Without a reference to this object, which would outlive its last use in a cycle, with all its memory.
        self.steps: list[Callable[[Tensor], Tensor]] = [
            partial(_conditions, self.transformer, step, weight_dtype) for step in sampler.plan
        ]
        self.head_recorder: Recorder | None = None
        self.recorded_heads: dict[int, Recorded] = {}  # by the number of tokens, which several steps share

    def begin_recording(self) -> None:
        """From the second batch on: by then the first one has made what libraries make at first use."""
        if self.record is not None and self.head_recorder is None:
            record, self.head_recorder = self.record(), self.record()
            self.steps = [Recorded(step, record) for step in self.steps]

    def conditions(self, step: Step, tokens: Tensor) -> Tensor:
        return self.steps[step.index](tokens)

    def sample(self, conditions: Tensor, draws: Tensor, guidance: Tensor) -> Tensor:
        run = self.head
        if self.head_recorder is not None:
            num_tokens = draws.shape[1]
            if num_tokens not in self.recorded_heads:
                self.recorded_heads[num_tokens] = Recorded(self.head, self.head_recorder)
            run = self.recorded_heads[num_tokens]
        return run(conditions, draws, guidance)


def _conditions(transformer: Transformer, step: Step, weight_dtype: torch.dtype, tokens: Tensor) -> Tensor:
    return transformer(step, tokens.to(weight_dtype))


def sample_tokens(model: MAR, class_labels: Tensor, *, noise: Noise | None = None, **settings) -> Tensor:
    """Sample one batch of latents [B, C, h, w]: `settings`, result and errors are those of `Sampler` and its call."""
    return Sampler(model, **settings)(class_labels, noise)
