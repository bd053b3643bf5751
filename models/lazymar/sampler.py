"""The loop over a run's steps, for the baseline and every policy alike."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.lazymar.head import HeadSampler
from models.lazymar.methods import Method, find_method
from models.lazymar.noise import ImageNoise, Noise
from models.lazymar.plan import HeadPlan, Step, make_plan
from models.lazymar.runtime import Capture, CaptureError, CudaCapture, Executor
from models.lazymar.selection import detail
from models.lazymar.transformer import Transformer
from models.mar import MAR

# Raised by hand when the same settings, weights and seed come to give other images, by more than rounding: a run that
# was begun with another version is then not continued. `tests/test_sampling.py` holds fingerprints that tell when.
SAMPLER_VERSION = 1


class SampledStep(NamedTuple):
    """A finished step: its plan, the conditions [2B or B, k, D] (ascending positions) and the tokens [B, k, C] it made.

    They hold until the next step overwrites them.
    """

    step: Step
    conditions: Tensor
    tokens: Tensor


class Sampler:
    """Samples batch after batch with the same settings; what these have in common is computed once.

    On a GPU the steps are captured as CUDA graphs. Where that fails they run eagerly, with a warning.

    Args:
        model:             the network; its device and dtype are used.
        method:            the method, or its name, such as "lazymar" or "lazymar+disa".
        cfg, cfg_schedule: CFG scale (1: no guidance) and "linear" or "constant".
        temperature:       scales the noise of the denoising steps.
        cuda_graphs:       whether to capture them, on a GPU.
        settings:          fields of `Method` that replace the method's, such as `num_iter` or `cache`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        model: MAR,
        method: Method | str = "mar",
        *,
        cfg: float = 3.25,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
        cuda_graphs: bool = True,
        **settings: Any,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, not {temperature}")
        self.model, self.device = model, model.mask_token.device
        self.dtype = torch.promote_types(model.mask_token.dtype, torch.float32)
        method = (find_method(method) if isinstance(method, str) else method).replaced(**settings)
        self.plan = make_plan(model.seq_len, model.buffer_size, method, cfg=cfg, cfg_schedule=cfg_schedule)
        self.num_draws = max(step.num_draws for step in self.plan)
        with torch.inference_mode():
            self.guidance = torch.tensor([step.cfg - 1 for step in self.plan], dtype=self.dtype, device=self.device)
            self.heads = {
                plan: HeadSampler(model.diffloss.net, plan, temperature, self.dtype) for plan in self.plan.heads
            }
        captures = cuda_graphs and self.device.type == "cuda"
        self.capture: Callable[[], Capture] | None = partial(CudaCapture, self.device) if captures else None
        self.state: _State | None = None  # of the batch size seen last

    def __call__(
        self,
        class_labels: Tensor,
        noise: Noise | None = None,
        on_step: Callable[[Step], object] | None = None,
    ) -> Tensor:
        """Return latents [B, C, h, w] for classes [B], at unit scale (`model.latent_scale` times the VAE's).

        They are float64 for a float64 model, otherwise float32.

        Args:
            noise:   the source of randomness: `ImageNoise` of seed 0 and images 0..B-1 if None.
            on_step: is called with each step once it has been handed to the device.

        Raises:
            ValueError: an argument has the wrong shape or range; the message names it.
        """
        try:
            return self._sample(class_labels, noise, on_step)
        except CaptureError as error:
            warnings.warn(f"CUDA graphs are not used, because capturing them failed: {error}", stacklevel=2)
        self.capture, self.state = None, None
        return self._sample(class_labels, noise, on_step)

    def is_warm(self, batch_size: int) -> bool:
        """Return whether the next batch of this size takes no time that later ones do not take."""
        return self.state is not None and self.state.num_images == batch_size and self.state.is_warm

    def warm_up(self, batch_size: int) -> None:
        """Do the one-time work of batches of this size now: load libraries, pack weights, capture CUDA graphs.

        That takes two batches on a GPU, and one step on a CPU.
        """
        labels = torch.zeros(batch_size, dtype=torch.long)
        while not self.is_warm(batch_size):
            if self.capture is not None:
                self(labels)
            else:
                next(self.steps(labels, None, self.empty_latents(batch_size)))

    def empty_latents(self, batch_size: int) -> Tensor:
        """Return memory for a batch's latents [B, C, h, w]."""
        side = self.model.grid_size * self.model.patch_size
        return torch.empty(batch_size, self.model.vae_embed_dim, side, side, dtype=self.dtype, device=self.device)

    def noise(self, seed: int, indices: Sequence[int]) -> ImageNoise:
        """Return the noise of a run's images [B], by their numbers, drawn on the model's device."""
        return ImageNoise(self.model, seed, indices, self.num_draws - 1, self.device)

    def _sample(self, class_labels: Tensor, noise: Noise | None, on_step: Callable[[Step], object] | None) -> Tensor:
        latents = self.empty_latents(len(class_labels))
        for sampled in self.steps(class_labels, noise, latents):
            if on_step is not None:
                on_step(sampled.step)
        return latents

    def steps(self, class_labels: Tensor, noise: Noise | None, latents: Tensor) -> Iterator[SampledStep]:
        """Sample like a call, one step at a time; `latents` [B, C, h, w] is filled when the last step is done."""
        model = self.model
        if class_labels.ndim != 1 or len(class_labels) < 1 or class_labels.is_floating_point():
            raise ValueError("class_labels must be a LongTensor [B] of at least one label")
        if int(class_labels.min()) < 0 or int(class_labels.max()) >= model.class_num:
            raise ValueError(f"class_labels must be from 0 to {model.class_num - 1}")
        if noise is None:
            noise = self.noise(0, range(len(class_labels)))
        if noise.orders.shape != (len(class_labels), model.seq_len):
            raise ValueError(
                f"noise.orders must be [{len(class_labels)}, {model.seq_len}] for these class_labels and this model, "
                f"not {list(noise.orders.shape)}"
            )
        with torch.inference_mode():
            yield from self._steps(class_labels.to(self.device), noise, latents)

    def _steps(self, class_labels: Tensor, noise: Noise, latents: Tensor) -> Iterator[SampledStep]:
        model = self.model
        # Tokens are kept in the order of prediction, those of one step in ascending position: every set of tokens that
        # a step needs is then a slice.
        order = noise.orders.to(self.device).flip(1)
        stages = torch.tensor(self.plan.stages, device=self.device)
        order = order.gather(1, stages[order].argsort(dim=1, stable=True))
        positions = torch.cat([order[:, step.predicted].sort(dim=1).values for step in self.plan], dim=1)
        tokens = torch.zeros(*positions.shape, model.token_dim, dtype=self.dtype, device=self.device)

        if self.state is None or self.state.num_images != len(positions):
            self.state = None  # its memory is free before the next one takes its own
            self.state = _State(self, len(positions))
        state = self.state
        state.transformer.begin(class_labels, positions)
        for step in self.plan:
            draws = noise.draw(step.index, step.num_tokens)
            shape = (step.num_draws, len(positions), step.num_tokens, model.token_dim)
            if len(draws) < step.num_draws or draws.shape[1:] != shape[1:]:
                raise ValueError(f"noise.draw must return {list(shape)} here, or more draws, not {list(draws.shape)}")
            draws = draws[: step.num_draws].to(self.device, self.dtype)
            conditions = state.conditions(step, tokens)
            tokens[:, step.predicted] = state.denoise(step, conditions, draws, self.guidance[step.index])
            yield SampledStep(step, conditions, tokens[:, step.predicted])
        state.end_batch()
        in_raster_order = torch.empty_like(tokens).scatter_(1, positions[..., None].expand_as(tokens), tokens)
        latents.copy_(model.unpatchify(in_raster_order))


class _State:
    """The state that batches of one size share: the transformer with its caches, and the executors."""

    def __init__(self, sampler: Sampler, num_images: int) -> None:
        self.num_images = num_images
        self.transformer = Transformer(sampler.model, sampler.plan, num_images)
        self._dtype, self._heads = sampler.model.mask_token.dtype, sampler.heads
        # The transformer's steps come in order, and leave tensors to one another. The head's calls are independent.
        self._execute_step, self._execute_head = Executor(sampler.capture), Executor(sampler.capture)

    def conditions(self, step: Step, tokens: Tensor) -> Tensor:
        """Return the step's conditions [2B or B, k, D], from all tokens [B, L, C]."""
        # Without a reference to `self`, which would outlive its last use in a cycle, with all its memory.
        return self._execute_step(step.index, partial(_conditions, self.transformer, step, self._dtype), tokens)

    def denoise(self, step: Step, conditions: Tensor, draws: Tensor, guidance: Tensor) -> Tensor:
        """Return the step's tokens [B, k, C], from draws [S + 1, B, k, C] of noise; detailed ones have their own chain.

        Calls for as many tokens with the same plan of the head share a graph.
        """
        if not step.num_detailed:
            return self._denoise(step.head, conditions, draws, guidance)
        tokens = torch.empty_like(draws[0])
        by_detail = detail(conditions[: self.num_images]).argsort(dim=1, descending=True, stable=True)
        heads, sizes = zip(*step.chains)
        for head, chosen in zip(heads, by_detail.split(sizes, dim=1)):
            rows = chosen.sort(dim=1).values[..., None]
            branches = rows.repeat(len(conditions) // self.num_images, 1, 1)
            made = self._denoise(
                head,
                conditions.take_along_dim(branches, dim=1),
                draws.take_along_dim(rows[None], dim=2),
                guidance,
            )
            tokens.scatter_(1, rows.expand_as(made), made)
        return tokens

    def _denoise(self, head: HeadPlan, conditions: Tensor, draws: Tensor, guidance: Tensor) -> Tensor:
        num_tokens = draws.shape[2]
        draws = draws[: len(head.steps) + 1].flatten(1, 2)
        key = num_tokens, head
        made = self._execute_head(key, self._heads[head], conditions.flatten(0, 1), draws, guidance)
        return made.unflatten(0, (-1, num_tokens))

    @property
    def is_warm(self) -> bool:
        return self._execute_head.is_warm

    def end_batch(self) -> None:
        self._execute_step.end_batch()
        self._execute_head.end_batch()


def _conditions(transformer: Transformer, step: Step, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    return transformer(step, tokens.to(dtype))


def sample_tokens(model: MAR, class_labels: Tensor, *, noise: Noise | None = None, **settings: Any) -> Tensor:
    """Sample one batch of latents [B, C, h, w]: `settings`, result and errors are those of `Sampler` and its call."""
    return Sampler(model, **settings)(class_labels, noise)
