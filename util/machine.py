"""The machine and the software that a run uses: device, dtype, processor, versions, digests of code and weights."""

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
    """Choose the device of a process: "cpu", "cuda" (the GPU with its number), or "auto" (a GPU where there are any).

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
    """Choose a dtype by its key in `DTYPES`, or "auto": bfloat16 on GPUs and CPUs that compute in it, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or cpu_computes_in_bfloat16() else "float32"
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's key in `DTYPES`."""
    return str(dtype).removeprefix("torch.")


def cpu_computes_in_bfloat16() -> bool:
    """Ask whether the CPU has instructions for bfloat16 matmuls that PyTorch uses.

    With them, bfloat16 is faster than float32; without, it is many times slower. The instructions are AMX (Intel),
    AVX512-BF16 (AMD and Intel), or Arm's bf16 extension. PyTorch says so itself; where it does not, as versions before
    2.5 do not for x86, the answer is no.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    # On x86 oneDNN has bfloat16 matmuls for every AVX-512, but without these it converts to float32 and back.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))


def mixed_precision(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 within the block where that is faster than float32; parameters stay float32. For training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_dtype("auto", device) == torch.bfloat16)


def where(device: torch.device) -> str:
    """Name host and device, for a person to read."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{socket.gethostname()} {device}{gpu}"


def processor_name(device: torch.device) -> str:
    """Name the GPU; or the CPU, how many of its threads are used, and the instructions that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # not Linux, or an Arm that does not tell
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return f"{torch.get_num_threads()} threads of {name}, {torch.backends.cpu.get_cpu_capability()}"


def describe(device: torch.device) -> dict[str, str]:
    """Describe all that numbers' rounding depends on: versions, processor and threads, and a digest of the code."""
    found = {"torch": str(torch.__version__)}
    for name in ("torch-fidelity", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):  # a benchmark needs no torch-fidelity
            found[name] = version(name)
    return {**found, "python": platform.python_version(), "processor": processor_name(device), "code": code_digest()}


def code_digest() -> str:
    """A digest of the code that makes images; any edit changes it, even of a comment."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("models/**/*.py"), *ROOT.glob("diffusion/*.py")]):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def weights_digest(network: nn.Module) -> str:
    """A digest of a network's weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def launch_name() -> str | None:
    """Name the launch by torchrun, which keeps its name when torchrun restarts processes; None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if run == "none" else run  # "none": launches without an id
