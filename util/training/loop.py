"""A resumable training loop: AdamW and Muon, warm-up and cosine decay, gradient clipping, an average of the weights."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from util.errors import InputError, describe_differences, why_unreadable
from util.files import atomic_write
from util.training.muon import Muon

SAVE_EVERY = 120.0  # seconds between checkpoints
REPORT_EVERY = 250  # steps between reports


Network = TypeVar("Network", bound=nn.Module)


def fit(
    module: Network,
    loss: Callable[[torch.Generator], Tensor],
    *,
    folder: Path,
    steps: int,
    lr: float,
    no_weight_decay: Iterable[str] = (),
    slow: Iterable[str] = (),
    matrices: Iterable[str] = (),
    weight_decay: float = 0.02,
    warmup: int = 100,
    clip: float = 3.0,
    ema_decay: float = 0.999,
    first_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    report: Callable[[int, Network], None] | None = None,
    steps_flag: str = "--steps",
    lr_flag: str = "--lr",
    device: torch.device,
) -> Network:
    """Train `module` in place for `steps` optimizer steps and return the average of its weights.

    Args:
        loss:            computes the loss of one step. It must draw everything random from the generator that it is
                         given: its seed is the step's number plus `first_seed`, so that a resumed run sees the batches
                         of an uninterrupted one.
        folder:          holds `training.pt`, from which the same call continues.
        no_weight_decay: prefixes of the names of parameters without weight decay, besides biases and norms.
        slow:            prefixes of the names of parameters that learn at a tenth of `lr`, without weight decay.
        matrices:        prefixes of the names of parameters of which those with weight decay are trained by Muon; AdamW
                         trains all others.
        first_seed:      the seed of the first step. A CPU's generator uses the lowest 32 bits alone.
        settings:        what else the training depends on, by flag; numbers and texts, which `training.pt` keeps.
        report:          called with the number of steps done and the average of the weights, every `REPORT_EVERY`
                         steps and after the last.
        steps_flag:      the flag that sets `steps`, for messages.
        lr_flag:         the flag that sets `lr`, for messages.

    Raises InputError if the folder holds a run of another model, length or learning rate, or with other settings, or if
    the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "training.pt"
    optimizers = _make_optimizers(
        module, lr, weight_decay, no_weight_decay=tuple(no_weight_decay), slow=tuple(slow), matrices=tuple(matrices)
    )
    average = copy.deepcopy(module).requires_grad_(False)
    start = 0
    if checkpoint.exists():
        rates = _peak_rates(optimizers)
        planned, start, began = _restore(checkpoint, module, average, optimizers)
        if planned != steps:
            raise InputError(f"{checkpoint} is of a run of {planned} steps: give {steps_flag} {planned} to continue")
        if _peak_rates(optimizers) != rates:
            raise InputError(f"{checkpoint} is of a run with another {lr_flag}: give the former one to continue")
        if others := describe_differences(began, settings or {}):
            raise InputError(
                f"{checkpoint} is of a run with other settings ({'; '.join(others)}): give those, or choose another "
                f"--output_dir"
            )

    def save(step: int) -> None:
        state = {"step": step, "steps": steps, "model": module.state_dict(), "model_ema": average.state_dict()}
        state["settings"] = dict(settings or {})
        with atomic_write(checkpoint) as temporary:
            torch.save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, temporary)

    generator = torch.Generator(device)
    module.train()
    last_save = time.monotonic()
    recent = None
    with tqdm(range(start, steps), initial=start, total=steps, unit="step", mininterval=10) as progress:
        for step in progress:
            for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
                group["lr"] = group["peak_lr"] * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            value = loss(generator.manual_seed(first_seed + step))
            module.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(ema_decay, (1 + step) / (10 + step))  # forget the random start quickly
            with torch.no_grad():
                for target, source in zip(average.parameters(), module.parameters()):
                    target.lerp_(source, 1 - decay)
            if step % 10 == 0 or step + 1 == steps:
                current = value.item()
                if not math.isfinite(current):
                    raise InputError(
                        f"the loss became {current} at step {step}: lower {lr_flag}, in a new --output_dir"
                    )
                recent = current if recent is None else recent + 0.1 * (current - recent)
                progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if report and ((step + 1) % REPORT_EVERY == 0 or step + 1 == steps):
                report(step + 1, average)
            if time.monotonic() - last_save > SAVE_EVERY:
                save(step + 1)
                last_save = time.monotonic()
    save(steps)
    return average.eval()


def _make_optimizers(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    no_weight_decay: tuple[str, ...],
    slow: tuple[str, ...],
    matrices: tuple[str, ...],
) -> list[torch.optim.Optimizer]:
    """Share a module's parameters out to AdamW and, if there are any for it, Muon; the arguments are those of `fit`."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    slowed: list[nn.Parameter] = []
    orthogonalized: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(slow):
            slowed.append(parameter)
        elif parameter.ndim < 2 or name.startswith(no_weight_decay):
            undecayed.append(parameter)
        else:
            (orthogonalized if name.startswith(matrices) else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "peak_lr": lr},
        {"params": undecayed, "weight_decay": 0.0, "peak_lr": lr},
        {"params": slowed, "weight_decay": 0.0, "peak_lr": 0.1 * lr},
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95))
    if not orthogonalized:
        return [adamw]
    return [adamw, Muon([{"params": orthogonalized, "weight_decay": weight_decay, "peak_lr": lr}], lr=lr)]


def _peak_rates(optimizers: list[torch.optim.Optimizer]) -> list[float | None]:
    """List the highest learning rate of each group of parameters; None where a foreign checkpoint has left it out."""
    return [group.get("peak_lr") for optimizer in optimizers for group in optimizer.param_groups]


def _restore(
    checkpoint: Path, module: nn.Module, average: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, int, dict[str, Any]]:
    """Load a run's state from its checkpoint; return the steps it was to take, those it has taken, and its settings."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        kept = state["optimizers"] if "optimizers" in state else [state["optimizer"]]  # one, in runs begun with 0.2.0
        module.load_state_dict(state["model"])
        average.load_state_dict(state["model_ema"])
        if len(kept) != len(optimizers):
            raise ValueError(f"it has {len(kept)} optimizers, not {len(optimizers)}")
        for optimizer, state_dict in zip(optimizers, kept):
            optimizer.load_state_dict(state_dict)
        return state["steps"], state["step"], state.get("settings", {})  # runs begun with 0.2.0 have none
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(
            f"{checkpoint} is not of this training ({why_unreadable(error)}): choose another --output_dir"
        ) from None
