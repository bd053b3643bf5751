"""Counts the arithmetic of sampling an image: its matrix products, at two operations per multiply-add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from diffusion.sampling import HeadSampler
from models.mar import MAR
from models.plan import CachePolicy, make_plan
from models.sampling import Transformer


class Flops(NamedTuple):
    """Floating-point operations per image, by part."""

    encoder: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


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


def count_flops(
    model: MAR,
    *,
    num_iter: int = 64,
    cfg: float = 3.25,
    num_sampling_steps: int = 100,
    cache: CachePolicy | None = None,
) -> Flops:
    """Operations that sampling one image takes, counted by running the sampler on tensors without values.

    `model` is on the meta device (made under `with torch.device("meta")`).
    """
    guided = cfg != 1
    plan = make_plan(model.seq_len, model.buffer_size, num_iter, cfg, "linear", cache)
    positions = torch.empty(1, model.seq_len, dtype=torch.long, device="meta")
    tokens = torch.empty(1, model.seq_len, model.token_dim, device="meta")
    counts = dict.fromkeys(Flops._fields, 0)

    def counted(part: str, function: Callable, *args):
        with ProductCounter() as counter:
            result = function(*args)
        counts[part] += counter.flops
        return result

    with torch.inference_mode():
        transformer = counted("decoder", Transformer, model, positions[:, 0], positions, guided, cache)
        for step in plan:
            encoded = counted("encoder", transformer.encode, step, tokens)
            counted("decoder", transformer.decode, step, encoded)
        # The head's work is the same for every token: that on one, times their number.
        conditions = torch.empty(2 if guided else 1, model.mask_token.shape[-1], device="meta")
        noise = torch.empty(num_sampling_steps + 1, 1, model.token_dim, device="meta")
        make_head = partial(HeadSampler, model.diffloss.net, num_sampling_steps, 1.0, guided, cache, torch.float32)
        head = counted("head", make_head)
        once = counts["head"]
        counted("head", head, conditions, noise, cfg)
    counts["head"] = once + (counts["head"] - once) * model.seq_len
    return Flops(**counts)
