"""A training loop that continues where it was stopped."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from util.errors import InputError, describe_differences, why_unreadable
from util.files import atomic_write

SAVE_EVERY = 100  # steps
WARMUP = 100  # steps
MAX_GRADIENT_NORM = 3.0


def fit(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    loss: Callable[[torch.Generator], Tensor],
    args: argparse.Namespace,
    name: str,
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
    first_seed: int = 0,
) -> None:
    """Train `module` in place. It ends in eval mode, with an exponential moving average of its weights.

    The learning rate rises to `lr` in the first steps, and falls to 0 along a cosine.

    Args:
        optimizers: new ones. A group of parameters may have an `lr_factor`.
        loss:       computes the loss of a step. It must draw all random numbers from the given generator, which is
                    seeded with the number of the step, so that a resumed training sees the same batches.
        args:       the training's flags. They are saved and compared.
        name:       the training is saved as `name`.pth in `--output_dir`; the same call continues from it.
        first_seed: seed of the first step. A CPU generator uses the lowest 32 bits only.

    Raises InputError if the file holds a training with other flags, or the loss is not finite.
    """
    path = args.output_dir / f"{name}.pth"
    settings = {flag: str(value) for flag, value in vars(args).items() if flag not in ("output_dir", "device")}

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        """Update an averaged parameter. The decay starts low, so that the initial weights are soon forgotten."""
        return averaged.lerp(current, 1 - min(ema_decay, (1 + int(count)) / (10 + int(count))))

    ema = AveragedModel(module, avg_fn=average)
    parts: list[Any] = [ema, module, *optimizers]
    done = _load(parts, path, settings)
    generator = torch.Generator(next(module.parameters()).device)
    progress = tqdm(range(done, steps), name, total=steps, initial=done, unit="step", mininterval=10)
    module.train()
    for step in progress:
        step_lr = lr * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = step_lr * group.get("lr_factor", 1.0)
        error = loss(generator.manual_seed(first_seed + step))
        progress.set_postfix(loss=f"{error.item():.4f}", refresh=False)
        if not error.isfinite():
            raise InputError(f"the loss became {error.item()}: lower the learning rate, in another --output_dir")
        module.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
        ema.update_parameters(module)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "settings": settings, "parts": [part.state_dict() for part in parts]}
            with atomic_write(path) as partial:
                torch.save(state, partial)
    module.load_state_dict(ema.module.state_dict())
    module.eval()


def _load(parts: Sequence[Any], path: Path, settings: Mapping[str, str]) -> int:
    """Load a saved training into `parts`, if there is one; return its number of steps."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(f"{path} is damaged ({why_unreadable(error)}): remove it to start again") from None
    if differences := describe_differences(state["settings"], settings):
        raise InputError(f"{path}: {', '.join(differences)}: give the same flags, or another --output_dir")
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["step"]
