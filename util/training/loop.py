"""A training loop that continues where it was stopped."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from util.errors import InputError
from util.files import atomic_write

SAVE_EVERY = 120.0  # seconds
WARMUP = 100  # steps
MAX_GRADIENT_NORM = 3.0


@dataclass(frozen=True)
class Phase:
    """One phase of a training. It starts from the averaged weights of the phase before, with new optimizers.

    The learning rate falls from `lr` to 0 along a cosine, after a warm-up. `loss` computes the loss of a step. It must
    draw all random numbers from the given generator, which is seeded with the number of the step, so that a resumed
    training sees the same batches. With an `ema_decay` of 0 the last weights replace the average.
    """

    steps: int
    lr: float
    loss: Callable[[torch.Generator], Tensor]
    ema_decay: float = 0.999

    def lr_at(self, step: int) -> float:
        """Return the learning rate at a step of this phase."""
        return self.lr * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def average(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        """Update one averaged parameter. The decay starts low, so that the initial weights are soon forgotten."""
        count = int(num_averaged)
        return averaged.lerp(current, 1 - min(self.ema_decay, (1 + count) / (10 + count)))


def fit(
    module: nn.Module,
    phases: Sequence[Phase],
    make_optimizers: Callable[[], Sequence[Optimizer]],
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    first_seed: int = 0,
) -> None:
    """Train `module` in place. It ends in eval mode, with the averaged weights of the last phase.

    Args:
        make_optimizers: makes the optimizers of a phase. A group of parameters may have an `lr_factor`.
        folder:          where `training.pth` is saved every two minutes; the same call continues from it.
        settings:        what the training depends on: numbers and strings by flag, which are saved and compared.
        first_seed:      seed of the first step. A CPU generator uses the lowest 32 bits only.

    Raises InputError if the folder holds a training with other settings, or the loss is not finite.
    """
    path = folder / "training.pth"
    settings = {**settings, "parameters": sum(parameter.numel() for parameter in module.parameters())}
    state = _read_state(path, settings)
    done = state["step"] if state else 0
    last_save = time.monotonic()
    generator = torch.Generator(device)
    progress = tqdm(total=sum(phase.steps for phase in phases), initial=done, unit="step", mininterval=10)
    end = 0
    for phase in phases:
        start, end = end, end + phase.steps
        if done > end:
            continue
        parts: list[Any] = [AveragedModel(module, avg_fn=phase.average), module, *make_optimizers()]
        average, _, *optimizers = parts
        if state:
            for part, saved in zip(parts, state["parts"], strict=True):
                part.load_state_dict(saved)
            state = None
        module.train()
        for step in range(max(done, start), end):
            for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
                group["lr"] = phase.lr_at(step - start) * group.get("lr_factor", 1.0)
            loss = phase.loss(generator.manual_seed(first_seed + step))
            module.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(module)

            done = step + 1
            progress.update()
            if done % 10 == 0 or done == end:
                progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                if not math.isfinite(loss.item()):
                    raise InputError(f"the loss became {loss.item()}: lower the learning rate, in another --output_dir")
            if done == progress.total or time.monotonic() - last_save > SAVE_EVERY:
                state_dicts = [part.state_dict() for part in parts]
                with atomic_write(path) as partial:
                    torch.save({"step": done, "settings": settings, "parts": state_dicts}, partial)
                last_save = time.monotonic()
        module.load_state_dict(average.module.state_dict())
    progress.close()
    module.eval()


def _read_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a saved training; None if there is none. Raises InputError if its settings differ or it is damaged."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = state["settings"]
    except Exception:  # a damaged file can fail anywhere in the reader
        raise InputError(f"{path} is damaged: remove it to start again, or choose another --output_dir") from None
    for name in {**there, **settings}:
        then, now = there.get(name), settings.get(name)
        if then != now:
            raise InputError(f"{path} has {name} {then}, not {now}: give the same settings, or another --output_dir")
    return state
