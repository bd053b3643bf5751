"""The diffusion head's part of a step: it denoises tokens for given conditions, with the head cache."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.ancestral import Ancestral
from diffusion.solver import Solver
from models.diffloss import DiffusionHead, modulate
from models.lazymar.plan import DenoisingKind, HeadPlan
from models.linear import Linear

FULL, WARMUP, REUSE = DenoisingKind
ROWS_PER_MATMUL = 4096  # modulations of several denoising steps are computed in one matmul, up to this many rows


class HeadCache:
    """The paper's head cache: what the denoising steps of one chain reuse. It holds the conditional branch alone.

    mlp_outputs: MLP output, before the gate, of each block that is not skipped; stored by full and warm-up steps, read
                 by reuse steps.
    residuals:   output - input of each consecutive group of skipped blocks, by its first block; stored by full steps.
    direction:   guidance direction, eps_cond - eps_uncond; stored by full steps. None without guidance.
    """

    def __init__(self) -> None:
        self.mlp_outputs: dict[int, Tensor] = {}
        self.residuals: dict[int, Tensor] = {}
        self.direction: Tensor | None = None


class HeadSampler:
    """Samples tokens for given conditions by one denoising chain.

    Noisy tokens, residual stream, first and last layer and the denoiser are in `dtype`, the blocks' matmuls in the
    head's own dtype: the first of 100 denoising steps multiplies an error of the predicted noise by 316.
    """

    def __init__(self, head: DiffusionHead, plan: HeadPlan, temperature: float, dtype: torch.dtype) -> None:
        self.head, self.plan = head, plan
        by_skipping = groupby(range(len(head.res_blocks)), key=lambda number: number in plan.skipped_blocks)
        self.block_groups = [(skipped, list(numbers)) for skipped, numbers in by_skipping]

        given = temperature, head.input_proj.weight.device, dtype
        self.denoiser = Solver(plan.solver, *given) if plan.solver else Ancestral(plan.timesteps, *given)
        times = head.time_embed(torch.from_numpy(np.array(plan.timesteps)))  # [S, W]; a solver's are fractions
        kinds = set(plan.kinds)
        self.times = {
            kind: torch.stack([time for time, its in zip(times, plan.kinds) if its is kind]) for kind in kinds
        }
        self.modulation_layers = {kind: self._modulation_layers(kind) for kind in kinds}

        self.input_weight, self.input_bias = _parameters(head.input_proj, dtype)
        self.output_layer = _parameters(head.final_layer.linear, dtype)
        self.blocks_dtype = next(head.res_blocks[0].mlp.parameters()).dtype
        self.norms = [_parameters(block.in_ln, dtype) for block in head.res_blocks]

    def _modulation_layers(self, kind: DenoisingKind) -> list[tuple[Linear, slice]]:
        """Return the layers whose outputs a denoising step of this kind uses, in order, and which of the outputs."""
        layers = []
        for skipped, blocks in self.block_groups:
            for layer in (self.head.res_blocks[number].adaLN_modulation[1] for number in blocks):
                if kind is FULL or (kind is WARMUP and not skipped):
                    layers.append((layer, slice(None)))
                elif not skipped:  # a cached MLP output needs only its gate
                    layers.append((layer, slice(2 * layer.in_features, None)))
        return [*layers, (self.head.final_layer.adaLN_modulation[1], slice(None))]

    def __call__(self, conditions: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        """Return tokens [n, C] for `conditions` [n, D], or [2n, D] with guidance, the conditional branch first.

        Args:
            noise:    [num_draws, n, C]: where denoising starts, then a draw for each ancestral step.
            guidance: [] the CFG scale - 1.
        """
        cache = HeadCache()
        x, advance = self.denoiser.begin(noise)
        embedded = self.head.cond_embed(conditions)
        modulations = {
            kind: Modulations(layers, self.times[kind], embedded if kind is FULL else embedded[: len(x)])
            for kind, layers in self.modulation_layers.items()
        }
        steps_done = dict.fromkeys(self.times, 0)  # of each kind
        # Denoising steps are done in groups of consecutive equal ones, cut where a matmul of modulations ends.
        for kind, group in groupby(self.plan.kinds):
            count = len(list(group))
            for *block_modulations, last_modulation in modulations[kind].at(steps_done[kind], count):
                if kind is REUSE:
                    reused = self._cached_sum(block_modulations, cache, len(last_modulation))
                for offset, modulation in enumerate(last_modulation):
                    if kind is REUSE:
                        h = F.linear(x, self.input_weight) + reused[offset]
                    else:
                        h = F.linear(x, self.input_weight, self.input_bias)
                        h = self._blocks(kind, h, [each[offset] for each in block_modulations], cache)
                    eps, v = self._predict(kind, h, modulation, cache)
                    if cache.direction is not None:
                        eps = torch.addcmul(eps, cache.direction, guidance)
                    x = advance(x, eps, v)
            steps_done[kind] += count
        return x

    def _blocks(self, kind: DenoisingKind, h: Tensor, modulations: list[Tensor], cache: HeadCache) -> Tensor:
        """Return the residual blocks' output for the projected tokens `h` [n, W]: [n, W], or [2n, W] of both branches.

        A warm-up step reuses the residuals of skipped blocks.
        """
        num_tokens, remaining = len(h), iter(modulations)
        if kind is FULL:
            h = h.repeat(self.plan.num_branches, 1)  # both branches denoise the same tokens
        for skipped, blocks in self.block_groups:
            if skipped and kind is not FULL:
                h = h + cache.residuals[blocks[0]]
                continue
            before = h
            for number in blocks:
                shift, scale, gate = next(remaining).chunk(3, dim=-1)
                update = self._mlp(number, h, shift, scale)
                if REUSE in self.times and not skipped:
                    cache.mlp_outputs[number] = update[:num_tokens]
                h = torch.addcmul(h, gate, update)
            if skipped:
                cache.residuals[blocks[0]] = (h - before)[:num_tokens]
        return h

    def _cached_sum(self, gates: list[Tensor], cache: HeadCache, num_steps: int) -> Tensor:
        """Return the sum [steps, n, W] of the first layer's bias and all cached contributions of blocks.

        Only the gates differ between consecutive reuse steps, so the sum is computed for several at once.
        """
        remaining = iter(gates)
        total = self.input_bias.expand(num_steps, 1, -1)
        for skipped, blocks in self.block_groups:
            if skipped:
                total = total + cache.residuals[blocks[0]]
            else:
                for number in blocks:
                    total = torch.addcmul(total, next(remaining), cache.mlp_outputs[number])
        return total

    def _mlp(self, number: int, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        block = self.head.res_blocks[number]
        weight, bias = self.norms[number]
        normed = F.layer_norm(h, h.shape[-1:], weight, bias, block.in_ln.eps)
        return block.mlp(modulate(normed, shift, scale).to(self.blocks_dtype))

    def _predict(self, kind: DenoisingKind, h: Tensor, modulation: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor]:
        """Return eps and v [n, C] of the conditional branch; a full step stores the guidance direction."""
        normed = F.layer_norm(h, h.shape[-1:], eps=self.head.final_layer.norm_final.eps)
        modulated = modulate(normed, *modulation.chunk(2, dim=-1)).to(h.dtype)
        eps, v = F.linear(modulated, *self.output_layer).chunk(2, dim=-1)
        if kind is FULL and self.plan.num_branches == 2:
            eps, unconditional = eps.chunk(2)
            cache.direction, v = eps - unconditional, v[: len(eps)]
        return eps, v


class Modulations:
    """Shifts, scales and gates for the denoising steps of one kind.

    An exact optimization: they depend on the timestep and the condition, not on the noisy tokens, so that one matmul
    serves several denoising steps.

    Args:
        layers:    linear layers that compute them, each with the part of its outputs that is wanted.
        times:     [S, W] embeddings of the denoising steps' timesteps.
        condition: [n, W] embedded conditions of the tokens.
    """

    def __init__(self, layers: list[tuple[Linear, slice]], times: Tensor, condition: Tensor) -> None:
        self.layers, self.times, self.condition = layers, times, condition
        self.chunk_size = max(1, ROWS_PER_MATMUL // len(condition))
        self.chunk_start, self.chunk = -1, list[Tensor]()  # computed last

    def at(self, start: int, count: int) -> Iterator[list[Tensor]]:
        """Yield each layer's outputs [steps, n, ...] for `count` denoising steps from `start`, in one piece or more."""
        stop = start + count
        while start < stop:
            chunk_start = start - start % self.chunk_size
            chunk_stop = chunk_start + self.chunk_size
            if chunk_start != self.chunk_start:
                y = F.silu(self.times[chunk_start:chunk_stop].unsqueeze(1) + self.condition)  # [steps, n, W]
                self.chunk_start, self.chunk = chunk_start, [layer.part(y, outputs) for layer, outputs in self.layers]
            piece = slice(start - chunk_start, min(stop, chunk_stop) - chunk_start)
            yield [outputs[piece] for outputs in self.chunk]
            start = min(stop, chunk_stop)


def _parameters(layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    return [parameter.detach().to(dtype) for parameter in layer.parameters()]
