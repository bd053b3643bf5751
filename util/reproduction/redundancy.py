"""Measures how similar the steps of the baseline are to those before, which is what LazyMAR's caches live on."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import MAR, CachePolicy, Method, Sampler
from models.lazymar.plan import Plan, Step
from util.reproduction.results import Band, Redundancy
from util.runs.options import labels_of_images

MAX_DISTANCE = CachePolicy().refresh_interval  # steps over which the difference between the branches is compared
ROW_GROUPS = ("predicted at the step before", "predicted at this step", "all others")


class Features(NamedTuple):
    """Features of all rows at one step of the baseline. Rows are [buffer | tokens in the order of prediction].

    values: of the decoder block that LazyMAR prunes at, conditional branch, [B, R, heads, head_dim].
    output: of the last decoder block, conditional branch first, [2B, R, D].
    """

    step: Step
    values: Tensor
    output: Tensor


@torch.inference_mode()
def measure_redundancy(model: MAR, *, num_images: int, seed: int, cfg: float, method: Method) -> Redundancy:
    """Sample images 0, 1, ... of classes 0, 1, ... in full, and compare each step with those before."""
    device = model.mask_token.device
    labels = torch.tensor(labels_of_images(range(num_images), model.class_num), device=device)
    sampler = Sampler(model, method, cfg=cfg)
    noise = sampler.noise(seed, range(num_images))
    tokens = model.patchify(sampler(labels, noise)).to(model.mask_token.dtype)
    order = noise.orders.to(device).flip(1)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    plan = sampler.plan
    layer = min(CachePolicy().prune_layer, len(model.decoder_blocks) - 1)

    values: dict[str, list[Tensor]] = {group: [] for group in ROW_GROUPS}  # a tensor for each step
    output: dict[str, list[Tensor]] = {group: [] for group in ROW_GROUPS}
    by_distance: dict[int, list[Changes]] = defaultdict(list)
    earlier: deque[Features] = deque(maxlen=MAX_DISTANCE)  # the latest first
    for features in trace(model, labels, plan, tokens, order, layer):
        if earlier:
            similar_values, similar_output = similarities(features, earlier[0])
            for group, rows in zip(ROW_GROUPS, row_groups(features.step, model.buffer_size, len(similar_output[0]))):
                values[group].append(similar_values[:, rows])
                output[group].append(similar_output[:, rows])
        for distance, before in enumerate(earlier, start=1):
            by_distance[distance].append(changes(features, before, model.buffer_size))
        earlier.appendleft(features)

    at_each_distance = [Changes(*map(torch.cat, zip(*found))) for found in by_distance.values()]
    return Redundancy(
        num_images=num_images,
        layer=layer,
        steps=list(range(1, len(plan))),
        distances=list(by_distance),
        values={group: band(steps) for group, steps in values.items()},
        output={group: band(steps) for group, steps in output.items()},
        **{name: band(getattr(found, name) for found in at_each_distance) for name in Changes._fields},
    )


def trace(
    model: MAR, class_labels: Tensor, plan: Plan, tokens: Tensor, order: Tensor, layer: int
) -> Iterator[Features]:
    """Compute the features of each step of a finished run.

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
                values_of_layer = block.attn.split_heads(values[: len(class_labels)])
            x = block.finish(x, queries, keys, values)
        yield Features(step, values_of_layer, x)


def similarities(now: Features, before: Features) -> tuple[Tensor, Tensor]:
    """Cosine similarity [B, R] of each row to itself at another step: of its values, averaged over heads, and of its
    output; conditional branch."""
    output, earlier_output = now.output.chunk(2)[0], before.output.chunk(2)[0]
    return (
        F.cosine_similarity(now.values, before.values, dim=-1).mean(dim=-1),
        F.cosine_similarity(output, earlier_output, dim=-1),
    )


def row_groups(step: Step, buffer_size: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [R] of the rows of each of `ROW_GROUPS`."""
    rows = torch.arange(num_rows) - buffer_size
    predicted_before = (step.previous <= rows) & (rows < step.start)
    predicted_now = (step.start <= rows) & (rows < step.stop)
    return predicted_before, predicted_now, ~(predicted_before | predicted_now)


class Changes(NamedTuple):
    """Differences between the branches of two steps, one number for each row that the later step predicts.

    The fields are explained in `Redundancy`, whose fields of the same names summarise them by distance.
    """

    similarity: Tensor
    change: Tensor
    error_difference: Tensor
    error_output: Tensor


def changes(now: Features, before: Features, buffer_size: int) -> Changes:
    """Compare the branches of two steps at the rows that the later one, `now`, predicts."""
    predicted = slice(buffer_size + now.step.start, buffer_size + now.step.stop)
    conditional, unconditional = now.output[:, predicted].chunk(2)
    old_conditional, old_unconditional = before.output[:, predicted].chunk(2)
    difference, old_difference = unconditional - conditional, old_unconditional - old_conditional
    change = (difference - old_difference).norm(dim=-1)
    norm = unconditional.norm(dim=-1)
    return Changes(
        similarity=F.cosine_similarity(difference, old_difference, dim=-1).flatten(),
        change=(change / difference.norm(dim=-1)).flatten(),
        error_difference=(change / norm).flatten(),
        error_output=((unconditional - old_unconditional).norm(dim=-1) / norm).flatten(),
    )


def band(many: Iterable[Tensor]) -> Band:
    """The mean and the middle 80 % of each of `many` tensors."""
    means, lows, highs = [], [], []
    for values in many:
        values = values.float().flatten()
        low, high = values.quantile(torch.tensor([0.1, 0.9], device=values.device)).tolist()
        means.append(values.mean().item())
        lows.append(low)
        highs.append(high)
    return Band(means, lows, highs)
