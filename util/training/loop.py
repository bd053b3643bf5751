"""A resumable training loop: AdamW with warm-up and cosine decay, gradient clipping and an average of the weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from util.errors import InputError, why_unreadable
from util.files import atomic_write

SAVE_EVERY = 120.0  # seconds between checkpoints


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
    weight_decay: float = 0.02,
    warmup: int = 100,
    clip: float = 3.0,
    ema_decay: float = 0.999,
    device: torch.device,
) -> Network:
    """Train `module` in place for `steps` optimizer steps and return the average of its weights.

    Args:
        loss:            computes the loss of one step. It must draw everything random from the generator that it is
                         given: its seed is the step's number, so that a resumed run sees the batches of an
                         uninterrupted one.
        folder:          holds `training.pt`, from which the same call continues.
        no_weight_decay: prefixes of the names of parameters without weight decay, besides biases and norms.
        slow:            prefixes of the names of parameters that learn at a tenth of `lr`, without weight decay.

    Raises InputError if the folder holds a run of another model or length, or if the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "training.pt"
    exempt, slow = tuple(no_weight_decay), tuple(slow)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "peak_lr": lr},
        {"params": [], "weight_decay": 0.0, "peak_lr": lr},
        {"params": [], "weight_decay": 0.0, "peak_lr": 0.1 * lr},
    ]
    for name, parameter in module.named_parameters():
        index = 2 if name.startswith(slow) else 1 if parameter.ndim < 2 or name.startswith(exempt) else 0
        groups[index]["params"].append(parameter)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95))
    average = copy.deepcopy(module).requires_grad_(False)
    start = 0
    if checkpoint.exists():
        start = _restore(checkpoint, module, average, optimizer, steps)

    def save(step: int) -> None:
        state = {"step": step, "steps": steps, "model": module.state_dict(), "model_ema": average.state_dict()}
        with atomic_write(checkpoint) as temporary:
            torch.save({**state, "optimizer": optimizer.state_dict()}, temporary)

    generator = torch.Generator(device)
    module.train()
    last_save = time.monotonic()
    recent = None
    with tqdm(range(start, steps), initial=start, total=steps, unit="step", mininterval=10) as progress:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            value = loss(generator.manual_seed(step))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            decay = min(ema_decay, (1 + step) / (10 + step))  # forget the random start quickly
            with torch.no_grad():
                for target, source in zip(average.parameters(), module.parameters()):
                    target.lerp_(source, 1 - decay)
            if step % 10 == 0:
                current = value.item()
                if not math.isfinite(current):
                    raise InputError(f"the loss became {current} at step {step}: lower --lr and start again")
                recent = current if recent is None else recent + 0.1 * (current - recent)
                progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if time.monotonic() - last_save > SAVE_EVERY:
                save(step + 1)
                last_save = time.monotonic()
    save(steps)
    return average.eval()


def _restore(
    checkpoint: Path, module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> int:
    """Load a run's state from its checkpoint, and return the step to go on from."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(state["model"])
        average.load_state_dict(state["model_ema"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(
            f"{checkpoint} is not of this training ({why_unreadable(error)}): choose another --output_dir"
        ) from None
    if state["steps"] != steps:
        raise InputError(
            f"{checkpoint} is of a run of {state['steps']} steps: give --steps {state['steps']} to continue"
        )
    return state["step"]
