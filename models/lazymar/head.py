"""Sampling tokens from the diffusion head, in full or with LazyMAR's head cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.ancestral import denoise
from diffusion.schedule import NoiseSchedule
from models.diffloss import DiffusionHead, ResidualBlock, modulate
from models.lazymar.plan import CachePolicy, HeadStep, make_head_plan
from models.linear import Linear

ROWS_PER_PRODUCT = 4096  # modulations are computed for several denoising steps at once up to this many rows


def modulated_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of `x` [n, W], modulated, in `dtype`."""
    return modulate(F.layer_norm(x, x.shape[-1:], weight, bias, eps), shift, scale).to(dtype)


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


class Modulations:
    """What the layers that modulate the head's blocks return, for the denoising steps of one kind in the order of use.

    They do not depend on the tokens, so that one product serves several steps.

    Args:
        layers:    the layers, each with the part of its outputs that is wanted.
        times:     [S, W] the steps' time embeddings.
        condition: [n, W] the tokens' conditions, embedded.
    """

    def __init__(self, layers: list[tuple[Linear, slice]], times: Tensor, condition: Tensor) -> None:
        self.layers, self.condition = layers, condition
        self.ahead = iter(times.split(max(1, ROWS_PER_PRODUCT // len(condition))))
        self.outputs: list[Tensor] = []  # of steps not taken yet

    def take(self, count: int) -> Iterator[list[Tensor]]:
        """Each layer's outputs [steps, n, ...] for the next `count` steps, in pieces of one step or more."""
        while count > 0:
            if not self.outputs or not len(self.outputs[0]):
                y = F.silu(next(self.ahead).unsqueeze(1) + self.condition)  # [steps, n, W]
                self.outputs = [layer.part(y, outputs) for layer, outputs in self.layers]
            piece = [output[:count] for output in self.outputs]
            self.outputs = [output[count:] for output in self.outputs]
            count -= len(piece[0])
            yield piece


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
        kinds = make_head_plan(num_sampling_steps, policy)
        self.kinds = [(kind, len(list(steps))) for kind, steps in groupby(kinds)]
        skipped = policy.head_skipped_blocks if policy is not None and policy.head_cache else ()
        numbers = range(len(head.res_blocks))
        self.runs = [(skip, list(run)) for skip, run in groupby(numbers, key=lambda number: number in skipped)]

        device = head.input_proj.weight.device
        schedule = NoiseSchedule.create(num_sampling_steps)
        # Per denoising step, in the order of use:
        embedding = head.time_embed(torch.tensor(schedule.timesteps[::-1]))  # [S, W]
        # Per kind of step, the layers that modulate it and the embeddings of its steps:
        self.modulated = {
            kind: (self._modulation_layers(kind), torch.stack([row for row, of in zip(embedding, kinds) if of == kind]))
            for kind in set(kinds)
        }
        columns = [schedule.x_coefficient, schedule.eps_coefficient, schedule.log_std_base, schedule.log_std_slope]
        coefficients = torch.from_numpy(np.stack(columns, axis=1)).flip(0)  # [S, 4]
        self.coefficients = [row.unbind() for row in coefficients.to(device, dtype)]

        self.input_weight, self.input_bias = _weights(head.input_proj, dtype)
        self.output_layer = _weights(head.final_layer.linear, dtype)
        self.norms = [_weights(block.in_ln, dtype) for block in head.res_blocks]

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

    def __call__(self, conditions: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        """Tokens [n, C] for `conditions` [n, D], or [2n, D] (conditional half first) under guidance.

        noise [S + 1, n, C]: the start, then one draw per denoising step. `guidance` []: the guidance scale - 1.
        """
        condition = self.head.cond_embed(conditions)
        num_tokens = noise.shape[1]
        modulations = {
            kind: Modulations(layers, times, condition if kind == HeadStep.FULL else condition[:num_tokens])
            for kind, (layers, times) in self.modulated.items()
        }
        cache = HeadCache()
        x, draws = noise[0], iter(zip(self.coefficients, [*noise[1:-1], None]))
        for kind, count in self.kinds:
            for *of_blocks, of_output in modulations[kind].take(count):
                reused = self._reused(of_blocks, cache, len(of_output)) if kind == HeadStep.REUSE else None
                for step, modulation in enumerate(of_output):
                    if reused is not None:
                        h = F.linear(x, self.input_weight) + reused[step]
                    else:
                        h = F.linear(x, self.input_weight, self.input_bias)
                        h = self._blocks(kind, h, [layer[step] for layer in of_blocks], cache)
                    eps, v = self._predict(kind, h, modulation, cache)
                    x = denoise(x, eps, v, cache.difference, guidance, *next(draws), self.temperature)
        return x

    def _blocks(self, kind: str, h: Tensor, modulations: Sequence[Tensor], cache: HeadCache) -> Tensor:
        """The residual blocks' output for the projected tokens `h` [n, W]; [2n, W] at a full step under guidance."""
        num_tokens, modulations = len(h), iter(modulations)
        if kind == HeadStep.FULL and self.guided:
            h = torch.cat([h, h])  # both halves denoise the same tokens
        for skip, blocks in self.runs:
            if skip and kind != HeadStep.FULL:
                h = h + cache.skipped[blocks[0]]
                continue
            before = h
            for number in blocks:
                *shift_scale, gate = next(modulations).chunk(3, dim=-1)
                update = self._mlp(number, h, *shift_scale)
                cache.mlp_outputs[number] = update[:num_tokens]
                h = torch.addcmul(h, gate, update)
            if skip:
                cache.skipped[blocks[0]] = (h - before)[:num_tokens]
        return h

    def _reused(self, gates: Sequence[Tensor], cache: HeadCache, num_steps: int) -> Tensor:
        """What the first layer's bias and the blocks add [steps, n, W] at steps that compute no block."""
        gates = iter(gates)
        added = self.input_bias.expand(num_steps, 1, -1)
        for skip, blocks in self.runs:
            if skip:
                added = added + cache.skipped[blocks[0]]
            else:
                for number in blocks:
                    added = torch.addcmul(added, next(gates), cache.mlp_outputs[number])
        return added

    def _mlp(self, number: int, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        block: ResidualBlock = self.head.res_blocks[number]
        dtype = block.mlp[0].weight.dtype
        return block.mlp(modulated_norm(h, *self.norms[number], block.in_ln.eps, shift, scale, dtype))

    def _predict(self, kind: str, h: Tensor, modulation: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor]:
        """The conditional eps and v, each [n, C], from the blocks' output; the difference to guide by is cached."""
        norm_eps = self.head.final_layer.norm_final.eps
        normed = modulated_norm(h, None, None, norm_eps, *modulation.chunk(2, dim=-1), h.dtype)
        eps, v = F.linear(normed, *self.output_layer).chunk(2, dim=-1)
        if kind == HeadStep.FULL and self.guided:
            eps, unconditional = eps.chunk(2)
            cache.difference, v = eps - unconditional, v[: len(eps)]
        return eps, v


def _weights(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    return [parameter.detach().to(dtype) for parameter in layer.parameters()]
