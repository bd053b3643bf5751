"""Counts the FLOPs of sampling an image: those of its matmuls, two per multiply-add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.lazymar.head import HeadSampler
from models.lazymar.methods import Method, find_method
from models.lazymar.plan import DenoisingStep, HeadPlan, Plan, make_plan
from models.lazymar.transformer import Transformer
from models.mar import MAR
from models.vae import AutoencoderKL


class Flops(NamedTuple):
    """FLOPs per image, by part."""

    encoder: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self)

    @classmethod
    def of_steps(cls, steps: Iterable[Flops]) -> Flops:
        """Return the sum over steps."""
        return cls(*map(sum, zip(*steps)))


class MatmulCounter(TorchFunctionMode):
    """Counts the FLOPs of linear layers and attention, which hold all matmuls here.

    `torch.utils.flop_counter` counts the same (a test compares them), but takes half a minute for one image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operators = 0

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Tensors without values need no arithmetic: a tensor of the right shape does.
        counted = (F.layer_norm, F.gelu, F.silu, F.linear, F.scaled_dot_product_attention)
        self.operators += func in counted
        if func in (F.layer_norm, F.gelu, F.silu):
            return args[0]
        if func is F.linear:
            rows, weight = args[:2]
            self.flops += 2 * rows.numel() * len(weight)
            return rows.new_empty(*rows.shape[:-1], len(weight))
        if func is F.scaled_dot_product_attention:
            queries, keys, values = args
            pairs = queries.shape[:-1].numel() * keys.shape[-2]
            self.flops += 2 * pairs * (queries.shape[-1] + values.shape[-1])
            return queries.new_empty(*queries.shape[:-1], values.shape[-1])
        return func(*args, **(kwargs or {}))


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that are executed, apart from those that only make a view or room for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        self.operators += not is_view and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


# Calls a function with arguments on tensors without values; returns what that took, and the function's result.
Measure = Callable[..., "tuple[int, Any]"]


class MeasuredStep(NamedTuple):
    """What the parts of a step take: encoder, decoder, and the head's chains, each with its number of tokens."""

    encoder: int
    decoder: int
    chains: list[tuple[int, int]]


def measure_steps(model: MAR, plan: Plan, measure: Measure) -> tuple[int, int, list[MeasuredStep]]:
    """Run the sampler for one image on tensors without values.

    Returns what the decoder takes once per batch, what the head takes once per run, and what each step takes. A chain
    of the head is for one token.
    """
    # The choice of rows takes no matmul, and a random one would need the order's values.
    plan = replace(plan, selection="similarity")
    positions = torch.empty(1, model.seq_len, dtype=torch.long, device="meta")
    tokens = torch.empty(1, model.seq_len, model.token_dim, device="meta")
    steps = []
    with torch.inference_mode():
        chains = measure_chains(model, plan.heads, measure)
        transformer = Transformer(model, plan, 1)
        decoder_once, _ = measure(transformer.begin, positions[:, 0], positions)
        for step in plan:
            in_encoder, encoded = measure(transformer.encode, step, tokens)
            in_decoder, _ = measure(transformer.decode, step, encoded)
            steps.append(
                MeasuredStep(in_encoder, in_decoder, [(chains[head][1], count) for head, count in step.chains])
            )
    return decoder_once, sum(made for made, _ in chains.values()), steps


def measure_chains(model: MAR, plans: Iterable[HeadPlan], measure: Measure) -> dict[HeadPlan, tuple[int, int]]:
    """Measure, for each plan of the head, how its sampler is made and how it denoises one token.

    All steps of a kind that follow one another take the same, so that any chain follows from the shortest ones.
    """

    @cache
    def short_chain(kinds: tuple[DenoisingStep, ...], skipped: tuple[int, ...], branches: int) -> list[int]:
        plan = HeadPlan(kinds, tuple(reversed(range(len(kinds)))), skipped, branches)
        conditions = torch.empty(branches, model.mask_token.shape[-1], device="meta")
        noise = torch.empty(1 + len(kinds), 1, model.token_dim, device="meta")
        made, sampler = measure(HeadSampler, model.diffloss.net, plan, 1.0, torch.float32)
        return [made, measure(sampler, conditions, noise, noise.new_empty(()))[0]]

    def chain(plan: HeadPlan) -> tuple[int, int]:
        def short(*between: DenoisingStep) -> list[int]:
            kinds = DenoisingStep.REFRESH, *between, DenoisingStep.REFRESH
            return short_chain(kinds, plan.skipped_blocks, plan.num_branches)

        of_two, total = short(), list(short())
        stretches = Counter(kind for kind, _ in plan.stretches)
        for kind, count in (Counter(plan.steps) - Counter({DenoisingStep.REFRESH: 2})).items():
            one, two = short(kind), short(kind, kind)
            for part in range(2):
                each = two[part] - one[part]
                at_first = one[part] - of_two[part] - each  # more at the first step of several in a row
                total[part] += count * each + stretches[kind] * at_first
        return total[0], total[1]

    return {plan: chain(plan) for plan in plans}


def flops_per_step(model: MAR, plan: Plan) -> list[Flops]:
    """Count what each step of sampling one image takes, by running the sampler on tensors without values.

    `model` is on the meta device (made under `with torch.device("meta")`). What a run computes once is in the first
    step's count.
    """

    def measure(function: Callable, *args: Any) -> tuple[int, Any]:
        with MatmulCounter() as counter:
            result = function(*args)
        return counter.flops, result

    decoder_once, head_once, steps = measure_steps(model, plan, measure)
    flops = [
        Flops(step.encoder, step.decoder, sum(per_token * count for per_token, count in step.chains)) for step in steps
    ]
    first = flops[0]
    return [Flops(first.encoder, first.decoder + decoder_once, first.head + head_once), *flops[1:]]


def count_operators(model: MAR, plan: Plan) -> int:
    """Count the operators of sampling a batch, whatever its size: on a GPU without captured graphs, as many launches.

    `model` is on the meta device. A run's own preparation is left out, since later batches do not repeat it.
    """

    def measure(function: Callable, *args: Any) -> tuple[int, Any]:
        with OperatorCounter() as executed, MatmulCounter() as replaced:
            result = function(*args)
        return executed.operators + replaced.operators, result

    decoder_once, _, steps = measure_steps(model, plan, measure)
    return decoder_once + sum(
        step.encoder + step.decoder + sum(operators for operators, _ in step.chains) for step in steps
    )


def count_flops(
    model: MAR, method: Method | str = "mar", *, cfg: float = 3.25, cfg_schedule: str = "linear", **settings: Any
) -> Flops:
    """Count what sampling one image takes; the arguments are those of `Sampler`, and see `flops_per_step`."""
    method = (find_method(method) if isinstance(method, str) else method).replaced(**settings)
    plan = make_plan(model.seq_len, model.buffer_size, method, cfg=cfg, cfg_schedule=cfg_schedule)
    return Flops.of_steps(flops_per_step(model, plan))


def count_decoding_flops(vae: AutoencoderKL, side: int) -> int:
    """Count what decoding one image of `side` x `side` latents takes. `vae` is on the meta device."""
    latents = torch.empty(1, vae.embed_dim, side, side, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return counter.get_total_flops()
