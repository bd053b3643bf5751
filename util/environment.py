"""What a run runs on: device, number format, memory and versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from util.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a process: "cpu", "cuda" (the GPU with its number), or "auto" (a GPU where there are any).

    Raises InputError if there is no such device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device on this machine; give --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """A key of `DTYPES`, or "auto": bfloat16 on GPUs and on CPUs that are made for it, float32 on others."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or cpu_has_bfloat16_units() else "float32"
    return DTYPES[name]


def cpu_has_bfloat16_units() -> bool:
    """Whether the CPU has matrix units for bfloat16 (Intel's AMX), which are several times faster than float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def where(device: torch.device) -> str:
    """Host and device, for a person."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{socket.gethostname()} {device}{gpu}"


def processor_name(device: torch.device) -> str:
    """The GPU, or the CPU and how many threads of it are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
        name = next(name for name in names if "CPU" in name or "Processor" in name)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads of {name}"


def describe(device: torch.device) -> dict[str, object]:
    """What has a say in how numbers are rounded: versions, and the GPU or the threads of each process."""
    packages = ("torchvision", "torch-fidelity", "numpy", "pillow")
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    found = {"torch": str(torch.__version__)}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # a benchmark needs no torch-fidelity
            found[name] = version(name)
    return {**found, "python": platform.python_version(), "processor": processor}


def code_digest() -> str:
    """Changes whenever the code that makes images does."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("models/*.py"), *ROOT.glob("diffusion/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def weights_digest(network: nn.Module) -> str:
    """Changes whenever a network's weights do."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def launch_name() -> str | None:
    """The same for a process and for those that torchrun starts in its place; None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if run == "none" else run  # "none": several have this one
