"""The machine and the software that a run uses: device, dtype, precision, versions; and what to do without memory."""

import contextlib
import hashlib
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from models import Sampler
from util.errors import InputError

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Choose the device of a process: "cpu", "cuda" (the GPU number `local_rank`), or "auto" (a GPU if there is one).

    Raises InputError if there is no such device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no usable GPU on this machine; give --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    torch.cuda.set_device(local_rank)
    # float32 means float32. In bfloat16, matmuls may add partial sums in bfloat16, which is PyTorch's default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    return torch.device("cuda", local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose a dtype by its key in `DTYPES`, or "auto": bfloat16 where the device computes in it, else float32."""
    if name == "auto":
        name = "bfloat16" if computes_in_bfloat16(device) else "float32"
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's key in `DTYPES`."""
    return str(dtype).removeprefix("torch.")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16 matmuls that PyTorch uses.

    With them, bfloat16 is faster than float32; without them it is many times slower. On GPUs they come with compute
    capability 8.0; on CPUs they are AMX (Intel), AVX512-BF16 (AMD and Intel) and Arm's bf16 extension.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    # On x86 oneDNN has bfloat16 matmuls for every AVX-512, but without these it converts to float32 and back.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))


def mixed_precision(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 within the block if that is faster than float32; parameters stay float32. For training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))


def introduce(device: torch.device, dtype: torch.dtype, world_size: int, *, asked: tuple[str, str]) -> str:
    """Say what computes, and note what a user may not expect who `asked` for this --device and --dtype."""
    line = f"{device.type} ({processor_name(device)}), {dtype_name(dtype)}, world size {world_size}"
    if asked[0] == "auto" and device.type == "cpu" and torch.version.cuda:
        return (
            f"{line}\nnote: PyTorch is built for CUDA {torch.version.cuda} and finds no usable GPU, so the CPU "
            "computes; nvidia-smi shows the GPUs and their driver, which may be too old"
        )
    if asked[1] == "auto" and device.type == "cuda" and dtype == torch.float32:
        return f"{line}\nnote: this GPU's compute capability is below 8.0, without bfloat16: --dtype decides"
    return line


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
    """Describe what the rounding of numbers depends on: versions and processor."""
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch-fidelity", "numpy", "pillow")}
    return {**versions, "processor": processor_name(device)}


def weights_digest(network: nn.Module) -> str:
    """Return a digest of a network's weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def retry_eagerly(sampler: Sampler, compute: Callable[..., T], *inputs: Any) -> T:
    """Return `compute(*inputs)`. If the GPU's memory runs out, free the CUDA graphs and compute once more without."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return compute(*inputs)
    print("note: out of GPU memory; this batch is made again, and all others, without CUDA graphs", flush=True)
    sampler.drop_graphs()
    torch.cuda.empty_cache()
    return compute(*inputs)


@contextlib.contextmanager
def out_of_memory_explained(batch_size: int) -> Iterator[None]:
    """Turn PyTorch's errors for lack of memory, which are many, into an `InputError` that names the ways out."""
    signs = ("out of memory", "OutOfMemory", "MemoryError", "allocate memory", "enough memory", "STATUS_ALLOC_FAILED")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not any(sign in repr(error) for sign in signs):
            raise
        raise InputError(
            f"out of memory at --eval_bsz {batch_size}: add --no-cuda_graphs, or if that is not enough give --eval_bsz "
            f"{max(1, batch_size // 2)}; either continues in the same folder"
        ) from error
