"""The loop over the autoregressive steps, for the baseline and every cache policy alike."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.lazymar.graphs import Capture, CaptureError, CudaCapture, Executor
from models.lazymar.head import HeadSampler
from models.lazymar.noise import ImageNoise, Noise
from models.lazymar.plan import HeadPlan, Plan, Step
from models.lazymar.transformer import Transformer
from models.mar import MAR

# Increased by hand when the same settings, weights and seed give other images, by more than rounding, or when a setting
# has another name: runs that began with an earlier version are then refused. Fingerprints of images are in
# `tests/test_sampling.py`.
SAMPLER_VERSION = 2


class SampledStep(NamedTuple):
    """A finished step: its plan, the positions [B, k] (ascending), the conditions [2B or B, k, D] and the tokens
    [B, k, C] it made.

    The next step may overwrite them.
    """

    step: Step
    positions: Tensor
    conditions: Tensor
    tokens: Tensor


class Sampler:
    """Samples batch after batch by the same plan; what the batches have in common is computed once.

    On a GPU the steps are captured as CUDA graphs. Where that fails they run eagerly, with a warning.

    Args:
        model:       the network; its device and dtype are used.
        plan:        what each step computes, by `make_plan`.
        cuda_graphs: False never captures CUDA graphs.

    Raises:
        ValueError: the plan does not fit the model.
    """

    def __init__(self, model: MAR, plan: Plan, *, cuda_graphs: bool = True) -> None:
        if plan.num_rows != model.buffer_size + model.seq_len:
            raise ValueError(f"the plan is of {plan.num_rows} rows, the model has {model.buffer_size + model.seq_len}")
        self.model, self.plan, self.device = model, plan, model.mask_token.device
        self.dtype = torch.promote_types(model.mask_token.dtype, torch.float32)
        self.num_draws = max(step.num_draws for step in plan)
        net, temperature = model.diffloss.net, plan.schedule.temperature
        with torch.inference_mode():
            self.guidance = torch.tensor([step.cfg - 1 for step in plan], dtype=self.dtype, device=self.device)
            self.heads = {head: HeadSampler(net, head, temperature, self.dtype) for head in plan.distinct_head_plans}
        captures = cuda_graphs and self.device.type == "cuda"
        self.make_capture: Callable[[], Capture] | None = partial(CudaCapture, self.device) if captures else None
        self.state: _State | None = None  # of the batch size seen last

    def __call__(
        self,
        class_labels: Tensor,
        noise: Noise | None = None,
        on_step: Callable[[SampledStep], object] | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Return latents [B, C, h, w] for classes [B], at unit variance: the VAE's latents times the preset's scale.

        They are float64 for a float64 model, otherwise float32.

        Args:
            noise:   the source of randomness; None: `ImageNoise` of seed 0 and images 0..B-1.
            on_step: is called with each step once its work is queued; again from the first step on if capturing fails.
            known:   latents [B, C, h, w] at unit variance, whose tokens at the plan's known positions are kept as they
                     are; the others are not read. Needed if the plan has known positions, and only then.

        Raises:
            ValueError: an argument has the wrong shape or range; the message names it.
        """
        try:
            return self._sample(class_labels, noise, on_step, known)
        except CaptureError as error:
            warnings.warn(f"CUDA graphs are not used, because capturing them failed: {error}", stacklevel=2)
        self.drop_graphs()
        return self._sample(class_labels, noise, on_step, known)

    def drop_graphs(self) -> None:
        """Free the captured graphs and the caches, and run eagerly from now on."""
        self.make_capture, self.state = None, None

    def is_warm(self, batch_size: int) -> bool:
        """Return True if the next batch of this size does no one-time work."""
        return self.state is not None and self.state.num_images == batch_size and self.state.is_warm

    def warm_up(self, batch_size: int) -> None:
        """Do the one-time work of batches of this size: two batches on a GPU, which captures graphs; else one step."""
        labels = torch.zeros(batch_size, dtype=torch.long)
        latents = self.empty_latents(batch_size).zero_()
        while not self.is_warm(batch_size):
            if self.make_capture is not None:
                self(labels, known=latents if self.plan.schedule.known else None)
            else:
                next(self.steps(labels, None, latents))

    def empty_latents(self, batch_size: int) -> Tensor:
        """Return uninitialized latents [B, C, h, w]."""
        side = self.model.grid_size * self.model.patch_size
        return torch.empty(batch_size, self.model.vae_embed_dim, side, side, dtype=self.dtype, device=self.device)

    def noise(self, seed: int, indices: Sequence[int]) -> ImageNoise:
        """Return the noise of a run's images [B], given their numbers, drawn on the model's device."""
        return ImageNoise(self.model, seed, indices, self.num_draws, self.device)

    def _sample(
        self,
        class_labels: Tensor,
        noise: Noise | None,
        on_step: Callable[[SampledStep], object] | None,
        known: Tensor | None,
    ) -> Tensor:
        latents = self.empty_latents(len(class_labels))
        if (known is not None) != bool(self.plan.schedule.known):
            raise ValueError("known must be given if the plan has known positions, and only then")
        if known is not None:
            if known.shape != latents.shape:
                raise ValueError(f"known must be latents {list(latents.shape)}, not {list(known.shape)}")
            latents.copy_(known)
        for sampled in self.steps(class_labels, noise, latents):
            if on_step is not None:
                on_step(sampled)
        return latents

    @torch.inference_mode()  # between steps, the caller's mode applies
    def steps(self, class_labels: Tensor, noise: Noise | None, latents: Tensor) -> Iterator[SampledStep]:
        """Sample like a call, one step at a time; `latents` [B, C, h, w] brings the known tokens, if the plan has some,
        and is filled after the last step."""
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
        positions = self.positions(noise.orders.to(self.device))
        num_images = len(positions)
        if self.state is None or self.state.num_images != num_images:
            self.state = None  # free its memory before the next one allocates its own
            self.state = _State(self, num_images)
        state = self.state
        tokens = torch.zeros(*positions.shape, self.model.token_dim, dtype=self.dtype, device=self.device)
        if num_known := len(self.plan.schedule.known):
            tokens[:, :num_known] = self.model.patchify(latents)[:, positions[0, :num_known]]
        state.transformer.begin(class_labels.to(self.device), positions)
        for step in self.plan:
            draws = noise.draw(step.index, step.num_tokens)
            shape = (step.num_draws, num_images, step.num_tokens, self.model.token_dim)
            if len(draws) < step.num_draws or draws.shape[1:] != shape[1:]:
                raise ValueError(f"noise.draw must return {list(shape)} here, or more draws, not {list(draws.shape)}")
            draws = draws[: step.num_draws].to(self.device, self.dtype)
            conditions = state.conditions(step, tokens)
            tokens[:, step.predicted] = state.denoise(step, conditions, draws, self.guidance[step.index])
            yield SampledStep(step, positions[:, step.predicted], conditions, tokens[:, step.predicted])
        state.end_batch()
        in_raster_order = torch.empty_like(tokens).scatter_(1, positions[..., None].expand_as(tokens), tokens)
        latents.copy_(self.model.unpatchify(in_raster_order))

    def positions(self, orders: Tensor) -> Tensor:
        """Return the positions [B, L] of the tokens in order of prediction, sorted within each step.

        Tokens that are known from the start come first. In this order, all tokens that a step needs are a slice.
        """
        order = orders.flip(1)  # MAR predicts the last token of its order first
        stages, known = self.plan.schedule.stages, self.plan.schedule.known
        if stages or known:
            stage_of = list(stages or [0] * self.model.seq_len)
            for position in known:
                stage_of[position] = -1
            order = order.gather(1, torch.tensor(stage_of, device=self.device)[order].argsort(dim=1, stable=True))
        ranges = [slice(0, len(known)), *(step.predicted for step in self.plan)]
        return torch.cat([order[:, each].sort(dim=1).values for each in ranges], dim=1)


class _State:
    """What batches of one size share: the transformer with its caches, and the executors."""

    def __init__(self, sampler: Sampler, num_images: int) -> None:
        self.num_images, self.score_tokens = num_images, sampler.plan.schedule.score_tokens
        self.transformer = Transformer(sampler.model, sampler.plan, num_images)
        self._dtype, self._heads = sampler.model.mask_token.dtype, sampler.heads
        # Steps of the transformer come in order, and read what earlier ones wrote. Calls of the head are independent.
        self._execute_step, self._execute_head = Executor(sampler.make_capture), Executor(sampler.make_capture)

    def conditions(self, step: Step, tokens: Tensor) -> Tensor:
        """Return the step's conditions [2B or B, k, D], from all tokens [B, L, C]."""
        # Bind no `self`: the reference cycle would delay freeing memory until the next garbage collection.
        return self._execute_step(step.index, partial(_conditions, self.transformer, step, self._dtype), tokens)

    def denoise(self, step: Step, conditions: Tensor, draws: Tensor, guidance: Tensor) -> Tensor:
        """Return the step's tokens [B, k, C], given the step's draws of noise [num_draws, B, k, C].

        If there are several chains, the first takes the tokens that `Schedule.score_tokens` scores highest, and so on.
        """
        heads, sizes = zip(*step.head_plans)
        if len(heads) == 1:
            return self._denoise(heads[0], conditions, draws, guidance)
        assert self.score_tokens is not None
        tokens = torch.empty_like(draws[0])
        by_score = self.score_tokens(conditions[: self.num_images]).argsort(dim=1, descending=True, stable=True)
        for head, chosen in zip(heads, by_score.split(sizes, dim=1)):
            picked = chosen.sort(dim=1).values[..., None]
            branches = picked.repeat(len(conditions) // self.num_images, 1, 1)
            made = self._denoise(
                head,
                conditions.take_along_dim(branches, dim=1),
                draws.take_along_dim(picked[None], dim=2),
                guidance,
            )
            tokens.scatter_(1, picked.expand_as(made), made)
        return tokens

    def _denoise(self, head: HeadPlan, conditions: Tensor, draws: Tensor, guidance: Tensor) -> Tensor:
        """Return tokens [B, k, C]. Calls with the same head plan and number of tokens share a graph."""
        num_tokens = draws.shape[2]
        draws = draws[: head.num_draws].flatten(1, 2)
        made = self._execute_head((num_tokens, head), self._heads[head], conditions.flatten(0, 1), draws, guidance)
        return made.unflatten(0, (-1, num_tokens))

    @property
    def is_warm(self) -> bool:
        return self._execute_head.is_warm

    def end_batch(self) -> None:
        self._execute_step.end_batch()
        self._execute_head.end_batch()


def _conditions(transformer: Transformer, step: Step, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    return transformer(step, tokens.to(dtype))
