"""How much of one step of the baseline is in the steps before: what LazyMAR's caches live on, measured on a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import MAR, CachePolicy, ImageNoise, sample_tokens
from models.lazymar.plan import Plan, Step, make_plan

MAX_DISTANCE = CachePolicy().refresh_interval  # steps over which differences are compared
ROW_GROUPS = ("predicted at the step before", "predicted at this step", "all others")


class Features(NamedTuple):
    """A step of the baseline. Rows are [buffer | tokens in the order of prediction].

    values: of the decoder block that LazyMAR prunes at, conditional half, [B, R, heads, head_dim].
    output: of the last decoder block, conditional half first, [2B, R, D].
    """

    step: Step
    values: Tensor
    output: Tensor


def trace(model: MAR, class_labels: Tensor, plan: Plan, tokens: Tensor, order: Tensor, layer: int) -> Iterator:
    """The `Features` of each step of a finished run.

    A step sees nothing but the tokens that were predicted before it, so its features can be had afterwards.

    Args:
        class_labels: [B].
        tokens:       [B, L, C] in the order of prediction.
        order:        [B, L] their positions.
        layer:        the decoder block whose values are wanted.
    """
    no_class = model.fake_latent.expand(len(class_labels), -1)
    class_embedding = torch.cat([model.class_emb(class_labels), no_class])
    tokens, positions = tokens.repeat(2, 1, 1), order.repeat(2, 1)
    for step in plan:
        known, masked = positions.split([step.start, model.seq_len - step.start], dim=1)
        encoded = model.encode(class_embedding, tokens[:, : step.start], known)
        x = torch.cat([model.decoder_input(encoded, known), model.masked_input(masked)], dim=1)
        for number, block in enumerate(model.decoder_blocks):
            queries, keys, values = block.attn.queries_keys_values(block.norm1(x))
            if number == layer:
                kept_values = block.attn.split_heads(values[: len(class_labels)])
            x = block.finish(x, queries, keys, values)
        yield Features(step, kept_values, x)


class Band:
    """A number by step or distance: its mean, and the range that holds the middle 80 % of what was seen."""

    def __init__(self) -> None:
        self.mean: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, values: Tensor) -> None:
        values = values.float().flatten()
        low, high = values.quantile(torch.tensor([0.1, 0.9], device=values.device)).tolist()
        self.mean.append(values.mean().item())
        self.low.append(low)
        self.high.append(high)


@torch.inference_mode()
def measure_redundancy(
    model: MAR, *, num_images: int, seed: int, cfg: float, num_iter: int = 64, num_sampling_steps: int = 100
) -> dict:
    """Similarities between steps of the baseline, over a few images of the model; images are of classes 0, 1, ...

    Returns:
        steps:      those compared with the one before, 1 to num_iter - 1.
        layer:      the decoder block of `values`, where LazyMAR compares rows.
        values:     by group of rows (`ROW_GROUPS`), the cosine similarity of a row's values, averaged over heads.
        output:     likewise, of the last block's output.
        distances:  of the steps compared, 1 to `MAX_DISTANCE`.
        difference: of the last block's output difference between the halves, at the rows predicted at the later step,
                    by distance: "cosine" similarity and relative "change" (norm of the change by that of the later).
        error:      of the unconditional half there, relative to its norm, if "difference reused" is added to the
                    conditional half, and if the "output reused" is its own of the earlier step.

    Each is a `Band`'s mean, low and high.
    """
    device = model.mask_token.device
    labels = torch.arange(num_images, device=device) % model.class_num
    noise = ImageNoise(model, seed, range(num_images), num_sampling_steps, device)
    settings = {"num_iter": num_iter, "cfg": cfg, "num_sampling_steps": num_sampling_steps}
    tokens = model.patchify(sample_tokens(model, labels, noise=noise, **settings)).to(model.mask_token.dtype)
    order = noise.orders.to(device).flip(1)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    plan = make_plan(model.seq_len, model.buffer_size, num_iter=num_iter, cfg=cfg, policy=None)
    layer = min(CachePolicy().prune_layer, len(model.decoder_blocks) - 1)

    values, output = ({group: Band() for group in ROW_GROUPS} for _ in range(2))
    compared = {"difference": ("cosine", "change"), "error": ("difference reused", "output reused")}
    seen = [{kind: [] for kinds in compared.values() for kind in kinds} for _ in range(MAX_DISTANCE)]
    earlier: deque[Features] = deque(maxlen=MAX_DISTANCE)  # the latest first
    for features in trace(model, labels, plan, tokens, order, layer):
        step, (conditional, unconditional) = features.step, features.output.chunk(2)
        if earlier:
            before = earlier[0]
            last, current = (slice(model.buffer_size + start, model.buffer_size + stop) for start, stop in
                             ((step.previous, step.start), (step.start, step.stop)))  # fmt: skip
            others = torch.ones(conditional.shape[1], dtype=torch.bool, device=device)
            others[last] = others[current] = False
            by_row = {
                "values": F.cosine_similarity(features.values, before.values, dim=-1).mean(dim=-1),
                "output": F.cosine_similarity(conditional, before.output[:num_images], dim=-1),
            }
            for name, bands in (("values", values), ("output", output)):
                for group, rows in zip(ROW_GROUPS, (last, current, others)):
                    bands[group].add(by_row[name][:, rows])
            for kinds, then in zip(seen, earlier):
                old_conditional, old_unconditional = then.output.chunk(2)
                change_of_output = (unconditional - old_unconditional)[:, current].norm(dim=-1)
                difference = (unconditional - conditional)[:, current]
                old_difference = (old_unconditional - old_conditional)[:, current]
                change = (difference - old_difference).norm(dim=-1)
                norm = unconditional[:, current].norm(dim=-1)
                kinds["cosine"].append(F.cosine_similarity(difference, old_difference, dim=-1).flatten())
                kinds["change"].append((change / difference.norm(dim=-1)).flatten())
                kinds["difference reused"].append((change / norm).flatten())
                kinds["output reused"].append((change_of_output / norm).flatten())
        earlier.appendleft(features)

    by_distance = {name: {kind: Band() for kind in kinds} for name, kinds in compared.items()}
    for bands in by_distance.values():
        for kind, band in bands.items():
            for kinds in seen[: num_iter - 1]:
                band.add(torch.cat(kinds[kind]))
    return {
        "num_images": num_images,
        "layer": layer,
        "steps": list(range(1, num_iter)),
        "values": {group: vars(band) for group, band in values.items()},
        "output": {group: vars(band) for group, band in output.items()},
        "distances": list(range(1, min(MAX_DISTANCE, num_iter - 1) + 1)),
        **{name: {kind: vars(band) for kind, band in kinds.items()} for name, kinds in by_distance.items()},
    }
