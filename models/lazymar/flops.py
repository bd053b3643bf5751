"""Counts the arithmetic of sampling an image: its matrix products, at two operations per multiply-add."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.lazymar.head import HeadSampler
from models.lazymar.plan import CachePolicy, make_plan
from models.lazymar.sampler import Transformer
from models.mar import MAR
from models.vae import AutoencoderKL


class Flops(NamedTuple):
    """Floating-point operations per image, by part."""

    encoder: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def of_steps(cls, steps: Iterable[Flops]) -> Flops:
        return cls(*map(sum, zip(*steps)))


class ProductCounter(TorchFunctionMode):
    """Counts the operations of linear layers and attention, which hold all matrix products here.

    `torch.utils.flop_counter` counts the same (a test compares them), but takes half a minute for one image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        # Tensors without values need no arithmetic: the costliest operations return a tensor of the right shape.
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


def flops_per_step(
    model: MAR,
    *,
    num_iter: int = 64,
    cfg: float = 3.25,
    num_sampling_steps: int = 100,
    cache: CachePolicy | None = None,
) -> list[Flops]:
    """Operations that each step of sampling one image takes, counted by running the sampler on tensors without values.

    `model` is on the meta device (made under `with torch.device("meta")`). What a run computes once is in the first
    step's count.
    """
    guided = cfg != 1
    if cache is not None:  # which rows are kept takes no product, and a random choice would need the order's values
        cache = replace(cache, selection="similarity")
    plan = make_plan(model.seq_len, model.buffer_size, num_iter, cfg, "linear", cache)
    positions = torch.empty(1, model.seq_len, dtype=torch.long, device="meta")
    tokens = torch.empty(1, model.seq_len, model.token_dim, device="meta")

    def counted(function: Callable, *args) -> tuple[int, Any]:
        with ProductCounter() as counter:
            result = function(*args)
        return counter.flops, result

    steps = []
    with torch.inference_mode():
        transformer = Transformer(model, 1, guided, cache)
        decoder_once, _ = counted(transformer.begin, positions[:, 0], positions)
        # The head's work is the same for every token: that on one, times their number.
        conditions = torch.empty(2 if guided else 1, model.mask_token.shape[-1], device="meta")
        noise = torch.empty(num_sampling_steps + 1, 1, model.token_dim, device="meta")
        make_head = partial(HeadSampler, model.diffloss.net, num_sampling_steps, 1.0, guided, cache, torch.float32)
        head_once, head = counted(make_head)
        per_token, _ = counted(head, conditions, noise, noise.new_empty(()))
        for step in plan:
            in_encoder, encoded = counted(transformer.encode, step, tokens)
            in_decoder, _ = counted(transformer.decode, step, encoded)
            steps.append(Flops(in_encoder, in_decoder, per_token * (step.stop - step.start)))
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
    """Operations that sampling one image takes; see `flops_per_step`."""
    steps = flops_per_step(model, num_iter=num_iter, cfg=cfg, num_sampling_steps=num_sampling_steps, cache=cache)
    return Flops.of_steps(steps)


def count_decoding_flops(vae: AutoencoderKL, side: int) -> int:
    """Operations that decoding one image of `side` x `side` latents takes. `vae` is on the meta device."""
    latents = torch.empty(1, vae.embed_dim, side, side, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return counter.get_total_flops()
