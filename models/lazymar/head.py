"""The diffusion head's part of a step: tokens for given conditions, by denoising; with the head cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.ancestral import denoise
from diffusion.schedule import NoiseSchedule
from models.diffloss import DiffusionHead, modulate
from models.lazymar.plan import DenoisingStep, HeadPlan
from models.linear import Linear

ROWS_PER_MATMUL = 4096  # modulations are computed for several denoising steps at once, up to this many rows


class HeadCache:
    """The paper's head cache: what the denoising steps of one autoregressive step reuse, of the conditional branch.

    mlp_outputs: each block's MLP output, before the gate; stored by the steps that compute it, read by REUSE.
    added:       what each run of skipped blocks added, by its first block; stored by REFRESH, read by all others.
    difference:  the predicted noise, conditional - unconditional, to guide by; stored by REFRESH, read by all. None
                 without guidance.
    """

    def __init__(self) -> None:
        self.mlp_outputs: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}
        self.difference: Tensor | None = None


class Modulations:
    """Shifts, scales and gates for the denoising steps of one kind, in the order of use.

    They depend on the denoising step and the condition, not on the noisy tokens, so that one matmul serves several
    steps: a saving without any loss.

    Args:
        layers:    the linear layers that compute them, each with the part of its outputs that is wanted.
        times:     [S, W] embeddings of the steps' timesteps.
        condition: [n, W] the tokens' embedded conditions.
    """

    def __init__(self, layers: list[tuple[Linear, slice]], times: Tensor, condition: Tensor) -> None:
        self.layers, self.condition = layers, condition
        self.times_ahead = iter(times.split(max(1, ROWS_PER_MATMUL // len(condition))))
        self.ahead: list[Tensor] = []  # computed, and not taken yet

    def take(self, count: int) -> Iterator[list[Tensor]]:
        """Yield each layer's outputs [steps, n, ...] for the next `count` steps, in pieces of one step or more."""
        while count > 0:
            if not self.ahead or not len(self.ahead[0]):
                y = F.silu(next(self.times_ahead).unsqueeze(1) + self.condition)  # [steps, n, W]
                self.ahead = [layer.part(y, outputs) for layer, outputs in self.layers]
            piece = [output[:count] for output in self.ahead]
            self.ahead = [output[count:] for output in self.ahead]
            count -= len(piece[0])
            yield piece


class PreparedStep(NamedTuple):
    """A denoising step, with all that it needs and that does not depend on the noisy tokens.

    modulations: shift, scale and gate [n, 3W] of each block that the step computes.
    reused:      [n, W] at a REUSE step, which computes no block: what all of them add. None at other steps.
    output:      shift and scale [n, 2W] of the final layer.
    """

    kind: DenoisingStep
    modulations: Sequence[Tensor]
    reused: Tensor | None
    output: Tensor


class HeadSampler:
    """Samples tokens for given conditions; made once per run.

    Noisy tokens, residual stream, first and last layer and the diffusion update are in `dtype`, the blocks' matmuls in
    the head's own: the first of 100 denoising steps multiplies an error of the predicted noise by 316.
    """

    def __init__(self, head: DiffusionHead, plan: HeadPlan, temperature: float, dtype: torch.dtype) -> None:
        self.head, self.plan, self.temperature = head, plan, temperature
        numbers = range(len(head.res_blocks))
        by_skipping = groupby(numbers, key=lambda number: number in plan.skipped_blocks)
        self.block_runs = [(skipped, list(run)) for skipped, run in by_skipping]

        device = head.input_proj.weight.device
        schedule = NoiseSchedule.of(plan.timesteps[::-1])
        # Per denoising step, in the order of use:
        times = head.time_embed(torch.tensor(plan.timesteps))  # [S, W]
        columns = [schedule.x_coefficient, schedule.eps_coefficient, schedule.log_std_base, schedule.log_std_slope]
        coefficients = torch.from_numpy(np.stack(columns, axis=1)).flip(0)  # [S, 4]
        self.coefficients = [row.unbind() for row in coefficients.to(device, dtype)]
        # Per kind of denoising step, the layers that modulate it and the embeddings of its timesteps:
        self.modulated = {
            kind: (
                self._modulation_layers(kind),
                torch.stack([time for time, its_kind in zip(times, plan.steps) if its_kind is kind]),
            )
            for kind in set(plan.steps)
        }

        self.input_weight, self.input_bias = _parameters(head.input_proj, dtype)
        self.output_layer = _parameters(head.final_layer.linear, dtype)
        self.blocks_dtype = next(head.res_blocks[0].mlp.parameters()).dtype
        self.norms = [_parameters(block.in_ln, dtype) for block in head.res_blocks]

    def _modulation_layers(self, kind: DenoisingStep) -> list[tuple[Linear, slice]]:
        """Return the layers whose outputs a step of this kind uses, in the order of use, and which of these."""
        layers = []
        for skipped, blocks in self.block_runs:
            for layer in (self.head.res_blocks[number].modulation for number in blocks):
                if kind is DenoisingStep.REFRESH or (kind is DenoisingStep.WARMUP and not skipped):
                    layers.append((layer, slice(None)))
                elif not skipped:  # a stored MLP output needs only its gate
                    layers.append((layer, slice(2 * layer.in_features, None)))
        return [*layers, (self.head.final_layer.modulation, slice(None))]

    def __call__(self, conditions: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        """Return tokens [n, C] for `conditions` [n, D], or [2n, D] under guidance, the conditional branch first.

        Args:
            noise:    [S + 1, n, C]: where denoising starts, then a draw for each step.
            guidance: [] the CFG scale - 1.
        """
        cache = HeadCache()
        x = noise[0]
        steps = self._prepared_steps(self.head.cond_embed(conditions), noise.shape[1], cache)
        for step, coefficients, draw in zip(steps, self.coefficients, [*noise[1:-1], None]):
            if step.reused is not None:
                h = F.linear(x, self.input_weight) + step.reused
            else:
                h = self._blocks(step, F.linear(x, self.input_weight, self.input_bias), cache)
            eps, v = self._predict(step, h, cache)
            x = denoise(x, eps, v, cache.difference, guidance, coefficients, draw, self.temperature)
        return x

    def _prepared_steps(self, condition: Tensor, num_tokens: int, cache: HeadCache) -> Iterator[PreparedStep]:
        """Yield the denoising steps in order, given the tokens' embedded conditions [n or 2n, W].

        `reused` is the same sum at all steps until the cache changes, but for the gates, and is computed for several
        steps at once: this must not run ahead of the loop, which fills the cache.
        """
        modulations = {
            kind: Modulations(layers, times, condition if kind is DenoisingStep.REFRESH else condition[:num_tokens])
            for kind, (layers, times) in self.modulated.items()
        }
        for kind, count in self.plan.stretches:
            for *of_blocks, of_output in modulations[kind].take(count):
                if kind is DenoisingStep.REUSE:
                    for reused, output in zip(self._reused(of_blocks, cache, len(of_output)), of_output):
                        yield PreparedStep(kind, [], reused, output)
                else:
                    for *of_step, output in zip(*of_blocks, of_output):
                        yield PreparedStep(kind, of_step, None, output)

    def _blocks(self, step: PreparedStep, h: Tensor, cache: HeadCache) -> Tensor:
        """Return the residual blocks' output for the projected tokens `h` [n, W]: [n, W], or [2n, W] of both branches.

        Blocks that the step skips add what they added at the last refresh.
        """
        num_tokens, ahead = len(h), iter(step.modulations)
        if step.kind is DenoisingStep.REFRESH:
            h = h.repeat(self.plan.num_branches, 1)  # both branches denoise the same tokens
        for skipped, blocks in self.block_runs:
            if skipped and step.kind is not DenoisingStep.REFRESH:
                h = h + cache.added[blocks[0]]
                continue
            before = h
            for number in blocks:
                shift, scale, gate = next(ahead).chunk(3, dim=-1)
                update = self._mlp(number, h, shift, scale)
                cache.mlp_outputs[number] = update[:num_tokens]
                h = torch.addcmul(h, gate, update)
            if skipped:
                cache.added[blocks[0]] = (h - before)[:num_tokens]
        return h

    def _reused(self, gates: Sequence[Tensor], cache: HeadCache, num_steps: int) -> Tensor:
        """Return what the first layer's bias and all blocks add [steps, n, W] at steps that compute no block."""
        ahead = iter(gates)
        total = self.input_bias.expand(num_steps, 1, -1)
        for skipped, blocks in self.block_runs:
            if skipped:
                total = total + cache.added[blocks[0]]
            else:
                for number in blocks:
                    total = torch.addcmul(total, next(ahead), cache.mlp_outputs[number])
        return total

    def _mlp(self, number: int, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        block = self.head.res_blocks[number]
        weight, bias = self.norms[number]
        normed = F.layer_norm(h, h.shape[-1:], weight, bias, block.in_ln.eps)
        return block.mlp(modulate(normed, shift, scale).to(self.blocks_dtype))

    def _predict(self, step: PreparedStep, h: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor]:
        """Return eps and v [n, C] of the conditional branch; a refresh stores the difference to guide by."""
        normed = F.layer_norm(h, h.shape[-1:], eps=self.head.final_layer.norm_final.eps)
        modulated = modulate(normed, *step.output.chunk(2, dim=-1)).to(h.dtype)
        eps, v = F.linear(modulated, *self.output_layer).chunk(2, dim=-1)
        if step.kind is DenoisingStep.REFRESH and self.plan.num_branches == 2:
            eps, unconditional = eps.chunk(2)
            cache.difference, v = eps - unconditional, v[: len(eps)]
        return eps, v


def _parameters(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    return [parameter.detach().to(dtype) for parameter in layer.parameters()]
