"""What reusing features changes, without the head's noise: errors of the conditions, and how similar steps are.

Teacher forcing: baseline and policy get the same tokens, those of a baseline run, and are compared step by step. It
needs a few dozen images, no statistics file and no decoded image.
"""

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models import MAR, CachePolicy, Sampler, Schedule, make_plan
from models.lazymar.flops import plan_flops
from models.lazymar.transformer import Transformer
from util.metrics import Estimate

PAPER = CachePolicy()
ROW_GROUPS = ("tokens predicted at the step before", "tokens predicted at this step", "all other rows")
REUSED = ("difference between the branches reused", "unconditional branch itself reused")


class Teacher(NamedTuple):
    """A baseline run of B images. Tokens are in order of prediction.

    conditions: for each step [2B, k, D], the conditional branch first; [B, k, D] at a step without guidance.
    spread:     root mean square distance of a token's conditional condition from the mean of all.
    """

    schedule: Schedule
    class_labels: Tensor  # [B]
    positions: Tensor  # [B, L]
    tokens: Tensor  # [B, L, C]
    conditions: list[Tensor]
    spread: float


@torch.inference_mode()
def make_teacher(model: MAR, schedule: Schedule, class_labels: Tensor, seed: int = 0) -> Teacher:
    """Sample images 0, 1, ... of classes [B] with the baseline, and keep their tokens and conditions."""
    sampler = Sampler(model, make_plan(schedule, buffer_size=model.buffer_size), cuda_graphs=False)
    noise, latents = sampler.noise(seed, range(len(class_labels))), sampler.empty_latents(len(class_labels))
    steps = [(each.conditions.clone(), each.tokens.clone()) for each in sampler.steps(class_labels, noise, latents)]
    conditions, tokens = zip(*steps)
    conditional = torch.cat([each[: len(class_labels)] for each in conditions], dim=1).flatten(0, 1).double()
    spread = (conditional - conditional.mean(dim=0)).square().sum(dim=-1).mean().sqrt().item()
    positions = sampler.positions(noise.orders.to(sampler.device))
    class_labels = class_labels.to(sampler.device)
    return Teacher(schedule, class_labels, positions, torch.cat(tokens, dim=1), list(conditions), spread)


@torch.inference_mode()
def condition_errors(model: MAR, teacher: Teacher, policy: CachePolicy) -> np.ndarray:
    """Return errors [2, T, B] of a policy's conditions, by step and image: means over the tokens of the step.

    The first are lengths of the conditional branch's error, relative to the teacher's `spread`; the second those of the
    guidance direction's (conditional minus unconditional), relative to its own length, nan without guidance.
    """
    plan = make_plan(teacher.schedule, policy, buffer_size=model.buffer_size)
    num_images = len(teacher.class_labels)
    transformer = Transformer(model, plan, num_images)
    transformer.begin(teacher.class_labels, teacher.positions)
    tokens, errors = teacher.tokens.to(model.mask_token.dtype), []
    for step, expected in zip(plan, teacher.conditions):
        found, expected = transformer(step, tokens).double(), expected.double()
        conditional = (found - expected)[:num_images].norm(dim=-1).mean(dim=1) / teacher.spread
        guidance = torch.full_like(conditional, math.nan)
        if step.cfg > 1:
            ours, theirs = (each[:num_images] - each[num_images:] for each in (found, expected))
            guidance = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).mean(dim=1)
        errors.append(torch.stack([conditional, guidance]))
    return torch.stack(errors, dim=1).cpu().numpy()


def mean_errors(errors: np.ndarray) -> list[Estimate]:
    """Return the means of both errors [2, T, B] over the steps and images, with standard errors over the images."""
    per_image = np.nanmean(errors, axis=1)
    standard_errors = per_image.std(axis=1, ddof=1) / math.sqrt(per_image.shape[1])
    return [Estimate(*pair) for pair in zip(per_image.mean(axis=1).tolist(), standard_errors.tolist())]


def measure_policies(
    model: MAR, teacher: Teacher, policies: Mapping[str, Mapping[str, CachePolicy]]
) -> dict[str, dict[str, Any]]:
    """Return what JSON can hold of the errors of policies in groups: means with standard errors, by step, and FLOPs."""
    measured: dict[CachePolicy, dict[str, Any]] = {}
    for policy in tqdm({policy for group in policies.values() for policy in group.values()}, desc="condition errors"):
        errors = condition_errors(model, teacher, policy)
        plan = make_plan(teacher.schedule, policy, buffer_size=model.buffer_size)
        flops = plan_flops(model, plan).total
        by_step, refreshes = np.nanmean(errors, axis=2).tolist(), [step.index for step in plan if step.refresh]
        measured[policy] = {"means": mean_errors(errors), "by_step": by_step, "refreshes": refreshes, "flops": flops}
    return {name: {label: measured[policy] for label, policy in group.items()} for name, group in policies.items()}


@torch.inference_mode()
def measure_redundancy(model: MAR, teacher: Teacher) -> dict[str, list[list[float]]]:
    """Compare each step of the baseline, given the teacher's tokens, with earlier ones.

    Returns means over images and rows:
        change: [T - 1, 3] by step and `ROW_GROUPS`: 1 - cosine similarity of the prune layer's values to the step
                before.
        errors: [N, 2] by distance in steps and `REUSED`: relative error of the unconditional branch's output.
    """
    plan, num_images = make_plan(teacher.schedule, buffer_size=model.buffer_size), len(teacher.class_labels)
    classes = torch.cat([model.class_emb(teacher.class_labels), model.fake_latent.expand(num_images, -1)])
    tokens, positions = teacher.tokens.to(classes.dtype).repeat(2, 1, 1), teacher.positions.repeat(2, 1)
    seen, change, errors = dict[str, Tensor](), [], defaultdict(list)
    earlier: deque[tuple[Tensor, Tensor]] = deque(maxlen=PAPER.refresh_interval)  # values and outputs, the latest first
    pruning = model.decoder_blocks[min(PAPER.prune_layer, len(model.decoder_blocks) - 1)].attn
    values_hook = pruning.register_forward_hook(lambda _, inputs, __: seen.update(values=inputs[1].chunk(2, -1)[1]))
    output_hook = model.decoder_blocks[-1].register_forward_hook(lambda _, __, output: seen.update(output=output))
    with values_hook, output_hook:
        for step in plan:
            model(classes, tokens[:, : step.start], positions)
            values = seen["values"][:num_images].unflatten(-1, (pruning.num_heads, -1))
            before, start, stop = (model.buffer_size + count for count in (step.previous_start, step.start, step.stop))
            if earlier:
                changed = 1 - F.cosine_similarity(values, earlier[0][0], dim=-1).mean(dim=(0, 2))
                first, newest, predicted, last = changed.tensor_split([before, start, stop])
                change.append([group.mean().item() for group in (newest, predicted, torch.cat([first, last]))])
            for distance, (_, output) in enumerate(earlier):
                errors[distance].append(reuse_errors(seen["output"][:, start:stop], output[:, start:stop]))
            earlier.appendleft((values, seen["output"]))
    means = [torch.cat(found, dim=1).mean(dim=1).tolist() for found in errors.values()]
    return {"change": change, "errors": means}


def reuse_errors(output: Tensor, earlier: Tensor) -> Tensor:
    """Return relative errors [2, n] of the unconditional half of the outputs [2B, k, D], for each of `REUSED`."""
    conditional, unconditional = output.chunk(2)
    old_conditional, old_unconditional = earlier.chunk(2)
    reused = torch.stack([conditional + old_unconditional - old_conditional, old_unconditional])
    return ((reused - unconditional).norm(dim=-1) / unconditional.norm(dim=-1)).flatten(1)
