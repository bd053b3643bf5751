"""The methods whose quality and costs are compared on the embedded model, and what each costs on every model."""

from __future__ import annotations

from collections.abc import Sequence

from models import Method
from models.lazymar.flops import Flops
from models.lazymar.methods import name_of
from util.reproduction.results import Costs
from util.runs.memory import cached_numbers
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
    "fast",
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
