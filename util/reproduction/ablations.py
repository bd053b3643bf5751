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
EARLY_PRUNING = CachePolicy(prune_layer=0)
WHY_EARLY = (
    "Rows are pruned in decoder block 0 here: behind the paper's block 3 mar_tiny has a single one, so that it hardly "
    "matters which rows go on."
)


@dataclass(frozen=True)
class Ablation:
    """One setting of LazyMAR that is varied.

    title:    the setting, for the reader.
    policies: the policy with each value of the setting, by a label that is short enough for an axis.
    base:     the one of `policies` with the paper's value.
    note:     tells the reader why `base` differs from the paper's policy in another setting; empty if it does not.
    """

    title: str
    policies: Mapping[str, CachePolicy]
    base: CachePolicy = PAPER_POLICY
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", MappingProxyType(dict(self.policies)))


def _kept(factor: float) -> CachePolicy:
    """The policy that keeps `factor` times the paper's fractions and margin of rows, and prunes early."""
    fractions = tuple((step, min(1.0, factor * fraction)) for step, fraction in PAPER_POLICY.kept_fractions)
    return replace(EARLY_PRUNING, kept_fractions=fractions, min_margin=int(factor * PAPER_POLICY.min_margin))


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
        "Decoder block that prunes", {str(block): CachePolicy(prune_layer=block) for block in range(4)}
    ),
    "kept_fraction": Ablation(
        "Rows kept, times the paper's",
        {
            "0.5": _kept(0.5),
            "1": EARLY_PRUNING,
            "2": _kept(2),
            "all rows": replace(EARLY_PRUNING, kept_fractions=((0, 1.0),)),
        },
        EARLY_PRUNING,
        WHY_EARLY,
    ),
    "selection": Ablation(
        "Rows kept are chosen by",
        {"similarity": EARLY_PRUNING, "chance": replace(EARLY_PRUNING, selection="random")},
        EARLY_PRUNING,
        WHY_EARLY,
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
