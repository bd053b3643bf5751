"""Sampling tokens from the diffusion head, in full or with LazyMAR's head cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from models.diffloss import DiffusionHead, ResidualBlock, modulate
from models.linear import Linear
from models.plan import CachePolicy, HeadStep, make_head_plan

ROWS_PER_PRODUCT = 4096  # modulations are computed for several denoising steps at once up to this many rows


class HeadCache:
    """What the denoising steps of one autoregressive step pass on, conditional half only.

    mlp_outputs: each computed block's mlp output, before the gate.
    skipped:     what each run of skipped blocks added.
    difference:  eps_cond - eps_uncond.
    """

    def __init__(self) -> None:
        self.mlp_outputs: dict[int, Tensor] = {}
        self.skipped: dict[int, Tensor] = {}
        self.difference: Tensor | None = None


class HeadSampler:
    """Samples tokens for given conditions; made once per run.

    Noisy tokens, residual stream, first and last layer and the diffusion update are in `dtype`, the blocks' products in
    the head's own: the first of 100 steps multiplies an error of the predicted noise by 316.
    """

    def __init__(
        self,
        head: DiffusionHead,
        num_sampling_steps: int,
        temperature: float,
        guided: bool,
        policy: CachePolicy | None,
        dtype: torch.dtype,
    ) -> None:
        self.head, self.temperature, self.guided = head, temperature, guided
        self.schedule = NoiseSchedule.create(num_sampling_steps)
        self.kinds = make_head_plan(num_sampling_steps, policy)
        skipped = policy.head_skipped_blocks if policy is not None and policy.head_cache else ()
        numbers = range(len(head.res_blocks))
        self.runs = [(skip, list(run)) for skip, run in groupby(numbers, key=lambda number: number in skipped)]

        device = head.input_proj.weight.device
        embedding = head.time_embed(torch.tensor(self.schedule.timesteps[::-1], device=device))  # [S, W], in use order
        self.time_embedding = {
            kind: torch.stack([row for row, of in zip(embedding, self.kinds) if of == kind]) for kind in set(self.kinds)
        }
        self.modulation_layers = {kind: self._modulation_layers(kind) for kind in self.time_embedding}
        self.input_layer = [parameter.to(dtype) for parameter in head.input_proj.parameters()]
        self.output_layer = [parameter.to(dtype) for parameter in head.final_layer.linear.parameters()]
        self.norms = [[parameter.to(dtype) for parameter in block.in_ln.parameters()] for block in head.res_blocks]

    def _modulation_layers(self, kind: str) -> list[tuple[Linear, slice]]:
        """The layers whose modulations a step of this kind uses, in the order of use, and which of their outputs."""
        layers = []
        for skip, blocks in self.runs:
            for layer in (self.head.res_blocks[number].adaLN_modulation[1] for number in blocks):
                if kind == HeadStep.FULL or (kind == HeadStep.WARM and not skip):
                    layers.append((layer, slice(None)))
                elif not skip:  # a stored mlp output needs only its gate
                    layers.append((layer, slice(2 * layer.in_features, None)))
        return [*layers, (self.head.final_layer.adaLN_modulation[1], slice(None))]

    def _modulations(self, kind: str, condition: Tensor) -> Iterator[Iterator[Tensor]]:
        """Per denoising step of this kind, its layers' modulations [rows, ...]; they do not depend on the tokens."""
        for times in self.time_embedding[kind].split(max(1, ROWS_PER_PRODUCT // len(condition))):
            y = F.silu(times.unsqueeze(1) + condition)  # [steps, rows, W]
            outputs = [layer.part(y, outputs) for layer, outputs in self.modulation_layers[kind]]
            yield from (iter(step) for step in zip(*outputs))

    def __call__(self, conditions: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        """Tokens [n, C] for `conditions` [n, D], or [2n, D] (conditional half first) under guidance.

        noise [S + 1, n, C]: the start, then one draw per denoising step. `guidance` []: the guidance scale - 1.
        """
        condition = self.head.cond_embed(conditions)
        num_tokens = noise.shape[1]
        streams = {
            kind: self._modulations(kind, condition if kind == HeadStep.FULL else condition[:num_tokens])
            for kind in self.time_embedding
        }
        cache = HeadCache()
        x = noise[0]
        for kind, index, draw in zip(self.kinds, reversed(range(len(self.kinds))), noise[1:]):
            modulations = next(streams[kind])
            h = self._blocks(kind, F.linear(x, *self.input_layer), modulations, cache)
            shift, scale = next(modulations).chunk(2, dim=-1)
            normed = F.layer_norm(h, h.shape[-1:], eps=self.head.final_layer.norm_final.eps)
            eps, v = F.linear(modulate(normed, shift, scale), *self.output_layer).chunk(2, dim=-1)
            if self.guided:
                if kind == HeadStep.FULL:
                    cache.difference = eps[:num_tokens] - eps[num_tokens:]
                eps = torch.addcmul(eps[:num_tokens], cache.difference, guidance)
            x = self._denoise(index, x, eps, v[:num_tokens], draw)
        return x

    def _blocks(self, kind: str, h: Tensor, modulations: Iterator[Tensor], cache: HeadCache) -> Tensor:
        """The residual blocks' output for the projected tokens `h` [n, W]; [2n, W] at a full step under guidance."""
        num_tokens = len(h)
        if kind == HeadStep.FULL and self.guided:
            h = h.repeat(2, 1)  # both halves denoise the same tokens
        for skip, blocks in self.runs:
            if skip and kind != HeadStep.FULL:
                h = h + cache.skipped[blocks[0]]
                continue
            before = h
            for number in blocks:
                *shift_scale, gate = next(modulations).split(h.shape[-1], dim=-1)
                if kind == HeadStep.REUSE:
                    update = cache.mlp_outputs[number]
                else:
                    update = self._mlp(number, h, *shift_scale)
                    cache.mlp_outputs[number] = update[:num_tokens]
                h = torch.addcmul(h, gate, update)
            if skip:
                cache.skipped[blocks[0]] = (h - before)[:num_tokens]
        return h

    def _mlp(self, number: int, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        block: ResidualBlock = self.head.res_blocks[number]
        normed = F.layer_norm(h, h.shape[-1:], *self.norms[number], eps=block.in_ln.eps)
        return block.mlp(modulate(normed, shift, scale).to(block.mlp[0].weight.dtype))

    def _denoise(self, index: int, x: Tensor, eps: Tensor, v: Tensor, noise: Tensor) -> Tensor:
        """One ancestral step, from `index` to `index` - 1, with the learned variance; no noise at 0."""
        schedule = self.schedule
        x = torch.add(float(schedule.x_coefficient[index]) * x, eps, alpha=float(schedule.eps_coefficient[index]))
        if index == 0:
            return x
        log_std = v * float(schedule.log_std_slope[index]) + float(schedule.log_std_base[index])
        return torch.addcmul(x, log_std.exp(), noise, value=self.temperature)
