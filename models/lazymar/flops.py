"""Counts the FLOPs of sampling an image: those of its matmuls, two per multiply-add."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.lazymar.head import HeadSampler
from models.lazymar.plan import Plan, make_plan
from models.lazymar.policy import CachePolicy
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
        self.flops = 0

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Tensors without values need no arithmetic: a tensor of the right shape does.
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


def flops_per_step(model: MAR, plan: Plan) -> list[Flops]:
    """Count what each step of sampling one image takes, by running the sampler on tensors without values.

    `model` is on the meta device (made under `with torch.device("meta")`). What a run computes once is in the first
    step's count.
    """
    # The choice of rows takes no matmul, and a random one would need the order's values.
    plan = replace(plan, selection="similarity")
    positions = torch.empty(1, model.seq_len, dtype=torch.long, device="meta")
    tokens = torch.empty(1, model.seq_len, model.token_dim, device="meta")
    conditions = torch.empty(plan.num_branches, model.mask_token.shape[-1], device="meta")

    def counted(function: Callable, *args: Any) -> tuple[int, Any]:
        with MatmulCounter() as counter:
            result = function(*args)
        return counter.flops, result

    steps, per_token, head_once = [], {}, 0
    with torch.inference_mode():
        transformer = Transformer(model, plan, 1)
        decoder_once, _ = counted(transformer.begin, positions[:, 0], positions)
        for step in plan:
            in_encoder, encoded = counted(transformer.encode, step, tokens)
            in_decoder, _ = counted(transformer.decode, step, encoded)
            if step.head not in per_token:  # the head's work is the same for every token
                made, head = counted(HeadSampler, model.diffloss.net, step.head, 1.0, torch.float32)
                noise = torch.empty(len(step.head.steps) + 1, 1, model.token_dim, device="meta")
                per_token[step.head], _ = counted(head, conditions, noise, noise.new_empty(()))
                head_once += made
            steps.append(Flops(in_encoder, in_decoder, per_token[step.head] * step.num_tokens))
    first = steps[0]
    return [Flops(first.encoder, first.decoder + decoder_once, first.head + head_once), *steps[1:]]


def count_flops(
    model: MAR,
    *,
    num_iter: int = 64,
    cfg: float = 3.25,
    num_sampling_steps: int = 100,
    cache: CachePolicy | None = None,
) -> Flops:
    """Count what sampling one image takes; see `flops_per_step`."""
    plan = make_plan(
        model.seq_len,
        model.buffer_size,
        num_iter=num_iter,
        cfg=cfg,
        num_sampling_steps=num_sampling_steps,
        policy=cache,
    )
    return Flops.of_steps(flops_per_step(model, plan))


def count_decoding_flops(vae: AutoencoderKL, side: int) -> int:
    """Count what decoding one image of `side` x `side` latents takes. `vae` is on the meta device."""
    latents = torch.empty(1, vae.embed_dim, side, side, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return counter.get_total_flops()
