"""The costs of an evaluation (plan, FLOPs, memory, time) that are known without running it."""

from __future__ import annotations

import torch

from models import MAR, PRESETS, Method, Sampler
from models.lazymar.flops import Flops
from util.reproduction.ablations import ABLATED_MODEL
from util.reproduction.frontier import costs_of
from util.reproduction.paper import TABLE_METHODS, name_in_table
from util.reproduction.results import Costs
from util.reproduction.study import Study, missing_file
from util.reproduction.timing import Latency, time_sampling
from util.runs.memory import check_memory, memory_needed, out_of_memory_explained
from util.runs.options import CheckedOptions
from util.weights.models import random_model

ESTIMATE_SECONDS = 5  # of sampling on a CPU; what takes longer is extrapolated


def print_costs(study: Study, device: torch.device, dtype: torch.dtype, processes: int) -> None:
    """Print what a study would compute, and how long that would take; write nothing."""
    total, rates = 0.0, {}
    for model in study.models:
        for name, method in TABLE_METHODS.items():
            options = study.options(model, method)
            print(describe(options, name, dtype), flush=True)
            latency, batch_size = time_batch(options, device, dtype)
            seconds = latency.seconds / batch_size
            print(
                f"  time        {seconds:.3f} s per image, {duration(seconds * options.num_images)} for one process "
                f"(a batch of {batch_size}, random weights, {latency.how}; without decoding and scoring)"
            )
            if missing := missing_file(options):
                print(f"  cannot run  {missing}", flush=True)
            rates[model, name] = seconds / Flops.of_steps(options.flops).total
            total += seconds * options.num_images
    varied = {Method(cache=policy) for *_, policy in study.settings()} - set(TABLE_METHODS.values())
    for method in varied:
        options = study.options(ABLATED_MODEL, method)
        total += rates[ABLATED_MODEL, "LazyMAR"] * Flops.of_steps(options.flops).total * options.num_images
    if varied:
        print(f"ablations: {len(varied)} further run(s) of {ABLATED_MODEL}, {study.num_compared} images each")
    for name, method in study.method.items():
        for model in PRESETS:
            print(describe_costs(name, model, costs_of(study.options(model, method)), dtype), flush=True)
        if ABLATED_MODEL in study.models and name_in_table(method) is None:
            options = study.options(ABLATED_MODEL, method)
            total += rates[ABLATED_MODEL, "LazyMAR"] * Flops.of_steps(options.flops).total * options.num_images
    print(f"all together: about {duration(total / processes)} of sampling with {processes} process(es)")


def time_batch(options: CheckedOptions, device: torch.device, dtype: torch.dtype) -> tuple[Latency, int]:
    """Time a batch with random weights, a small one on a CPU; returns its latency and its size.

    Raises InputError if it does not fit into memory.
    """
    batch_size = options.eval_bsz if device.type == "cuda" else min(options.eval_bsz, 4)
    check_memory(options.meta_model, options.plan, batch_size, dtype, device)
    with out_of_memory_explained(batch_size):
        return time_random_model(options, device, dtype, batch_size, ESTIMATE_SECONDS), batch_size


def time_random_model(
    options: CheckedOptions, device: torch.device, dtype: torch.dtype, batch_size: int, limit: float
) -> Latency:
    """Time a batch of an evaluation with random weights, on a CPU for about `limit` seconds."""
    sampler = Sampler(random_model(options.model, device, dtype)[0], **options.sampling)
    sampler.warm_up(batch_size)
    return time_sampling(sampler, batch_size, options.flops, limit)


def describe(options: CheckedOptions, method: str, dtype: torch.dtype) -> str:
    """A paragraph on an evaluation: its plan, FLOPs, parameters and memory."""
    model, flops = options.meta_model, Flops.of_steps(options.flops)
    plan = options.plan
    lazy = [step for step in plan if not step.refresh]
    steps = f"{len(plan)} steps: {len(plan) - len(lazy)} in full, {len(lazy)} lazy"
    if lazy:
        steps += f" with {lazy[0].num_kept} at first and {lazy[-1].num_kept} at last of {plan.num_rows} rows"
    parts = ", ".join(f"{part} {amount / 1e12:.3f}" for part, amount in flops._asdict().items())
    weights, per_image = memory_needed(model, plan, dtype)
    return (
        f"{options.model}, {method}: {options.num_images:,} images in batches of {options.eval_bsz}\n"
        f"  plan        {steps}\n"
        f"  TFLOPs      {flops.total / 1e12:.3f} per image ({parts})\n"
        f"  parameters  {num_parameters(model) / 1e6:.1f} M\n"
        f"  memory      at least {(weights + per_image * options.eval_bsz) / 1e9:.3f} GB per process, "
        f"{weights / 1e9:.3f} of it for weights"
    )


def describe_costs(method: str, model: str, costs: Costs, dtype: torch.dtype) -> str:
    """A line on what a method costs a model, by its plan."""
    parts = ", ".join(f"{part} {amount / 1e12:.3f}" for part, amount in costs.flops._asdict().items())
    return (
        f"{method}, {model}: {costs.flops.total / 1e12:.3f} TFLOPs per image ({parts}), "
        f"{costs.transformer_steps} steps of the transformer and {costs.head_evaluations:,} of the head one after the "
        f"other, {costs.cached_numbers * dtype.itemsize / 1e6:.1f} MB cached per image"
    )


def num_parameters(model: MAR) -> int:
    """The number of a model's parameters, on whatever device."""
    return sum(parameter.numel() for parameter in model.parameters())


def duration(seconds: float) -> str:
    """A number of seconds in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
