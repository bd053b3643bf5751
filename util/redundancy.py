"""How similar the steps of the baseline are to earlier steps, which is the premise of LazyMAR's caches."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import MAR, CachePolicy, Plan, make_plan
from models.lazymar.plan import Step
from util.condition_errors import Teacher

POLICY = CachePolicy()
ROW_GROUPS = ("tokens predicted at the step before", "tokens predicted at this step", "all other rows")
REUSED = ("difference between the branches reused", "unconditional branch itself reused")


class Features(NamedTuple):
    """Features of all rows R at one step of the baseline."""

    step: Step
    values: Tensor  # of the decoder block that LazyMAR prunes at, conditional branch [B, R, heads, head_dim]
    output: Tensor  # of the last decoder block, conditional branch first [2B, R, D]


@torch.inference_mode()
def measure_redundancy(model: MAR, teacher: Teacher) -> dict[str, list[list[float]]]:
    """Compare each step of the baseline, given the teacher's tokens, with earlier ones.

    Returns means over images and rows:
        change: [S - 1, 3] by step and `ROW_GROUPS`: 1 - cosine similarity of the prune layer's values to the step
                before.
        errors: [D, 2] by distance in steps and `REUSED`: relative error of the unconditional branch's output.
    """
    plan = make_plan(teacher.schedule, buffer_size=model.buffer_size)
    tokens = teacher.tokens.to(model.mask_token.dtype)
    change, errors = [], defaultdict(list)
    earlier: deque[Features] = deque(maxlen=POLICY.refresh_interval)  # the latest first
    for now in trace(model, teacher.class_labels, plan, tokens, teacher.positions):
        for before in list(earlier)[:1]:
            changed = 1 - F.cosine_similarity(now.values, before.values, dim=-1).mean(dim=-1)
            groups = row_groups(now.step, model.buffer_size, plan.num_rows)
            change.append([changed[:, rows].mean().item() for rows in groups])
        for distance, before in enumerate(earlier):
            errors[distance].append(reuse_errors(now, before, model.buffer_size))
        earlier.appendleft(now)
    means = [torch.cat(found, dim=1).mean(dim=1).tolist() for found in errors.values()]
    return {"change": change, "errors": means}


def trace(model: MAR, class_labels: Tensor, plan: Plan, tokens: Tensor, order: Tensor) -> Iterator[Features]:
    """Yield the features of each step, given all tokens [B, L, C] in order of prediction and their positions [B, L].

    A step depends only on the tokens that were predicted before it, so its features can be computed afterwards. Their
    rows are the buffer, then the tokens in order.
    """
    num_images, seen = len(class_labels), dict[str, Tensor]()
    class_embedding = torch.cat([model.class_emb(class_labels), model.fake_latent.expand(num_images, -1)])
    pruning = model.decoder_blocks[min(POLICY.prune_layer, len(model.decoder_blocks) - 1)].attn
    hooks = [
        pruning.register_forward_hook(lambda _, inputs, __: seen.update(values=inputs[1][:num_images].chunk(2, -1)[1])),
        model.decoder_blocks[-1].register_forward_hook(lambda _, __, output: seen.update(output=output)),
    ]
    for step in plan:
        model(class_embedding, tokens[:, : step.start].repeat(2, 1, 1), order.repeat(2, 1))
        yield Features(step, seen["values"].unflatten(-1, (pruning.num_heads, -1)), seen["output"])
    for hook in hooks:
        hook.remove()


def row_groups(step: Step, buffer_size: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks [R] of the rows of each of `ROW_GROUPS`."""
    rows = torch.arange(num_rows) - buffer_size
    predicted_before = (step.previous_start <= rows) & (rows < step.start)
    predicted_now = (step.start <= rows) & (rows < step.stop)
    return predicted_before, predicted_now, ~(predicted_before | predicted_now)


def reuse_errors(now: Features, before: Features, buffer_size: int) -> Tensor:
    """Return relative errors [2, n] of the unconditional output of the rows predicted `now`, for each of `REUSED`."""
    predicted = slice(buffer_size + now.step.start, buffer_size + now.step.stop)
    conditional, unconditional = now.output[:, predicted].chunk(2)
    old_conditional, old_unconditional = before.output[:, predicted].chunk(2)
    reused = torch.stack([conditional + old_unconditional - old_conditional, old_unconditional])
    return ((reused - unconditional).norm(dim=-1) / unconditional.norm(dim=-1)).flatten(1)
