"""The methods whose quality and costs are compared on the embedded model, and what each costs on every model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from models import MAR, Method
from models.lazymar.caches import ConditionCache, TokenCache
from models.lazymar.flops import Flops
from models.lazymar.methods import name_of
from models.lazymar.plan import Plan
from models.lazymar.transformer import Transformer
from util.reproduction.results import Costs
from util.runs.methods import find_methods
from util.runs.options import CheckedOptions

FRONTIER = (
    "mar",
    "lazymar",
    "disa",
    "gtr",
    "recap",
    "lazymar+disa",
    "lazymar+gtr",
    "lazymar+disa+lateguidance",
    "lazymar+gtr+lateguidance",
)


def choose_frontier(names: Sequence[str]) -> dict[str, Method]:
    """Return the methods of the names that `--method` gives, each once; ["none"] is none.

    Raises InputError for an unknown name, or for a composition that cannot be.
    """
    methods = {} if list(names) == ["none"] else find_methods(names)
    return {str(name_of(method)): method for method in methods.values()}


def costs_of(options: CheckedOptions) -> Costs:
    """Return the costs of an evaluation that its plan decides."""
    plan = options.plan
    return Costs(
        flops=Flops.of_steps(options.flops),
        transformer_steps=len(plan),
        head_evaluations=plan.head_evaluations,
        cached_numbers=cached_numbers(options.meta_model, plan),
    )


def cached_numbers(model: MAR, plan: Plan) -> int:
    """Return how many numbers an image keeps from one step to the next: those of its token and condition cache.

    `model` is on the meta device.
    """
    transformer = Transformer(model, plan, 1)
    tensors: list[Tensor] = []
    if isinstance(transformer.token_cache, TokenCache):
        tokens = transformer.token_cache
        rows = chain(tokens.encoder_rows, tokens.decoder_rows.values())
        tensors += chain.from_iterable(cached.tensors for cached in rows)
        tensors += [value for value in vars(tokens.selection.rule).values() if isinstance(value, torch.Tensor)]
    if isinstance(transformer.condition_cache, ConditionCache):
        tensors.append(transformer.condition_cache.difference)
    return sum(tensor.numel() for tensor in tensors)
