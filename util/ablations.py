"""The ablations: LazyMAR's settings, one varied at a time, the others as the paper has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from models import CachePolicy
from util.errors import InputError

LAZYMAR = CachePolicy()
ABLATED_MODEL = "mar_tiny"


@dataclass(frozen=True)
class Ablation:
    """A setting that is varied: the policy of each of its values, by a name that is short enough for an axis."""

    title: str
    policies: Mapping[str, CachePolicy]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", MappingProxyType(dict(self.policies)))


def _one_cache(name: str) -> CachePolicy:
    switches = dict.fromkeys(("token_cache", "condition_cache", "head_cache"), False)
    return CachePolicy(**{**switches, name: True})


def _kept(factor: float) -> CachePolicy:
    """`factor` times the paper's fractions and margin."""
    fractions = tuple((step, min(1.0, factor * fraction)) for step, fraction in LAZYMAR.kept_fractions)
    return CachePolicy(kept_fractions=fractions, min_margin=int(factor * LAZYMAR.min_margin))


ABLATIONS = {
    "caches": Ablation(
        "Caches in use",
        {
            "token": _one_cache("token_cache"),
            "condition": _one_cache("condition_cache"),
            "head": _one_cache("head_cache"),
            "all": LAZYMAR,
        },
    ),
    "refresh_interval": Ablation(
        "Refresh interval, steps",
        {str(steps): CachePolicy(refresh_interval=steps) for steps in (3, 5, 7, 9, 11, 13, 17)},
    ),
    "start_step": Ablation("Start step", {str(step): CachePolicy(start_step=step) for step in (0, 5, 10, 20)}),
    "kept_fraction": Ablation(
        "Rows kept, times the paper's",
        {"0.5": _kept(0.5), "1": LAZYMAR, "2": _kept(2), "all rows": CachePolicy(kept_fractions=((0, 1.0),))},
    ),
    "selection": Ablation(
        "Rows kept are chosen by", {"similarity": LAZYMAR, "chance": CachePolicy(selection="random")}
    ),
}


def run_name(ablation: str, label: str) -> str:
    """What the run and the result of one setting are called."""
    return f"{ablation}-{label}".replace(" ", "-")


def choose_ablations(names: Sequence[str]) -> dict[str, Ablation]:
    """The ablations of these names; ["all"] and ["none"] are two more. Raises InputError for an unknown name."""
    if names in (["all"], ["none"]):
        return dict(ABLATIONS) if names == ["all"] else {}
    for name in names:
        if name not in ABLATIONS:
            raise InputError(f"--ablations {name} is unknown: choose from {', '.join(ABLATIONS)}, or all, or none")
    return {name: ABLATIONS[name] for name in names}
