"""How much a cache policy changes the conditions that the head gets: a direct measure, without the head's noise.

Teacher forcing: baseline and policy get the same tokens, those of a baseline run, and their conditions are compared
step by step. It needs a few dozen images, no statistics file and no decoded image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models import MAR, CachePolicy, Plan, Sampler, Schedule, make_plan
from models.lazymar.flops import Flops, flops_per_step
from models.lazymar.transformer import Transformer
from util.jackknife import Spread


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


class ConditionErrors(NamedTuple):
    """Errors of a policy's conditions [S, B], by step and image: means over the tokens that the step predicts.

    conditional: length of the error of the conditional branch's condition, relative to the teacher's `spread`.
    guidance:    length of the error of conditional minus unconditional, relative to its own; nan without guidance.
    """

    conditional: np.ndarray
    guidance: np.ndarray

    def means(self, first_step: int = 0) -> list[Spread]:
        """Return the means of both from a step on, with standard errors over the images."""
        per_image = [np.nanmean(errors[first_step:], axis=0) for errors in self]
        return [Spread(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))) for each in per_image]


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
    return Teacher(schedule, class_labels, positions, torch.cat(tokens, dim=1), list(conditions), spread)


@torch.inference_mode()
def condition_errors(model: MAR, plan: Plan, teacher: Teacher) -> ConditionErrors:
    """Compare the conditions that a plan computes with the teacher's, given the teacher's tokens.

    Raises ValueError if the plan has another schedule than the teacher, or no lazy step.
    """
    if plan.schedule != teacher.schedule:
        raise ValueError("the teacher was sampled with another schedule than the plan's: make one for this schedule")
    if all(step.refresh for step in plan):
        raise ValueError("the plan has no lazy step, so there is no error to measure: choose another cache policy")
    num_images = len(teacher.class_labels)
    transformer = Transformer(model, plan, num_images)
    transformer.begin(teacher.class_labels.to(teacher.positions.device), teacher.positions)
    tokens, conditional, guidance = teacher.tokens.to(model.mask_token.dtype), [], []
    for step, expected in zip(plan, teacher.conditions):
        found, expected = transformer(step, tokens).double(), expected.double()
        error = (found - expected)[:num_images].norm(dim=-1).mean(dim=1) / teacher.spread
        conditional.append(error.cpu().numpy())
        relative = torch.full_like(error, math.nan)
        if step.cfg > 1:
            ours, theirs = (each[:num_images] - each[num_images:] for each in (found, expected))
            relative = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).mean(dim=1)
        guidance.append(relative.cpu().numpy())
    return ConditionErrors(np.stack(conditional), np.stack(guidance))


def measure_policies(
    model: MAR, teacher: Teacher, policies: Mapping[str, Mapping[str, CachePolicy]]
) -> dict[str, dict[str, Any]]:
    """Return what JSON can hold of the errors of policies in groups: means with standard errors, by step, and FLOPs."""
    measured: dict[CachePolicy, dict[str, Any]] = {}
    for policy in tqdm({policy for group in policies.values() for policy in group.values()}, desc="condition errors"):
        plan = make_plan(teacher.schedule, policy, buffer_size=model.buffer_size)
        errors = condition_errors(model, plan, teacher)
        measured[policy] = {
            "means": errors.means(),
            "by_step": [np.nanmean(each, axis=1).tolist() for each in errors],
            "refresh_steps": [step.index for step in plan if step.refresh],
            "flops": Flops.of_steps(flops_per_step(model, plan)).total,
        }
    return {name: {label: measured[policy] for label, policy in group.items()} for name, group in policies.items()}
