"""The ablations: one setting of LazyMAR is varied at a time, and the others stay as the paper has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from models import CachePolicy
from util.errors import InputError

PAPER_POLICY = CachePolicy()
ABLATED_MODEL = "mar_tiny"
NO_CACHE = CachePolicy(token_cache=False, condition_cache=False, head_cache=False)


@dataclass(frozen=True)
class Ablation:
    """One setting of LazyMAR that is varied.

    title:    the setting, for the reader.
    policies: the policy with each value of the setting, the paper's among them, by a label short enough for an axis.
    """

    title: str
    policies: Mapping[str, CachePolicy]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", MappingProxyType(dict(self.policies)))


def _kept(factor: float) -> CachePolicy:
    """The policy that keeps `factor` times the paper's fractions and margin of rows."""
    fractions = tuple((step, min(1.0, factor * fraction)) for step, fraction in PAPER_POLICY.kept_fractions)
    return CachePolicy(kept_fractions=fractions, min_margin=int(factor * PAPER_POLICY.min_margin))


ABLATIONS = {
    "caches": Ablation(
        "Caches in use",
        {
            "token": replace(NO_CACHE, token_cache=True),
            "condition": replace(NO_CACHE, condition_cache=True),
            "head": replace(NO_CACHE, head_cache=True),
            "all": PAPER_POLICY,
        },
    ),
    "refresh_interval": Ablation(
        "Refresh interval, steps",
        {str(steps): CachePolicy(refresh_interval=steps) for steps in (3, 5, 7, 9, 11, 13, 17)},
    ),
    "start_step": Ablation("Start step", {str(step): CachePolicy(start_step=step) for step in (0, 5, 10, 20)}),
    "prune_layer": Ablation(
        "Decoder block that prunes", {str(block): CachePolicy(prune_layer=block) for block in (0, 1, 3, 5)}
    ),
    "kept_fraction": Ablation(
        "Rows kept, times the paper's",
        {
            "0.5": _kept(0.5),
            "1": PAPER_POLICY,
            "2": _kept(2),
            "all rows": CachePolicy(kept_fractions=((0, 1.0),)),
        },
    ),
    "selection": Ablation(
        "Rows kept are chosen by",
        {"similarity": PAPER_POLICY, "chance": CachePolicy(selection="random")},
    ),
}


def run_name(ablation: str, label: str) -> str:
    """The name of the run of one setting: `ablation` and the setting's `label`, without blanks."""
    return f"{ablation}-{label}".replace(" ", "-")


def choose_ablations(names: Sequence[str]) -> dict[str, Ablation]:
    """The ablations of the names that `--ablations` gives: ["all"], ["none"], or some of `ABLATIONS`.

    Raises InputError for an unknown name.
    """
    if names in (["all"], ["none"]):
        return dict(ABLATIONS) if names == ["all"] else {}
    for name in names:
        if name not in ABLATIONS:
            raise InputError(f"--ablations {name} is unknown: choose from {', '.join(ABLATIONS)}, or all, or none")
    return {name: ABLATIONS[name] for name in names}
