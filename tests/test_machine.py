"""The machine of a run: device, dtype and precision, what is printed and recorded of them, memory and CUDA graphs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from util import machine
from util.errors import InputError
from util.options import parse_options
from util.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("processor", "onednn", "instructions", "fast"),
    [
        ("x86_64", True, "", torch.float32),  # AVX-512 without bfloat16
        ("AMD64", True, "amx_tile", torch.bfloat16),
        ("x86_64", False, "amx_tile", torch.float32),  # which oneDNN may not use
        ("aarch64", True, "", torch.bfloat16),
    ],
)
def test_bfloat16_is_the_default_where_the_processor_computes_in_it(processor, onednn, instructions, fast, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == instructions, raising=False)
    assert machine.choose_dtype("auto", CPU) == fast
    assert machine.choose_dtype("float64", CPU) == torch.float64
    with machine.mixed_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == fast


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists a processor's instructions")
def test_pytorch_and_linux_agree_on_this_processor():
    """If PyTorch renamed its functions, bfloat16 would silently no longer be used."""
    listed = {"amx_bf16", "avx512_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert machine.computes_in_bfloat16(CPU) == bool(listed)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is one GPU; calling the fixture gives it a name and a compute capability."""

    def pretend(name: str, capability: tuple[int, int]) -> None:
        for function, answer in {
            "is_available": True,
            "device_count": 1,
            "set_device": None,
            "get_device_name": name,
            "get_device_capability": capability,
        }.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)

    return pretend


def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so(gpu):
    gpu("Tesla T4", (7, 5))
    assert machine.choose_device("auto") == GPU and machine.choose_dtype("auto", GPU) == torch.float32
    lines = machine.introduce(GPU, torch.float32, 1, asked=("auto", "auto")).splitlines()
    assert lines[0] == "cuda (Tesla T4), float32, world size 1" and "compute capability is below 8.0" in lines[1]
    assert machine.choose_dtype("bfloat16", GPU) == torch.bfloat16
    with pytest.raises(InputError, match="--nproc_per_node must be at most 1, the number of GPUs here"):
        machine.choose_device("auto", local_rank=1)
    gpu("NVIDIA A100", (8, 0))
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    assert machine.choose_dtype("auto", machine.choose_device("cuda")) == torch.bfloat16
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("built_for", ["13.0", None])
def test_a_gpu_that_cannot_be_used_is_mentioned(built_for, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert machine.choose_device("auto") == CPU
    note = "built for CUDA 13.0 and finds no usable GPU"
    assert (note in machine.introduce(CPU, torch.float32, 1, asked=("auto", "auto"))) == bool(built_for)
    with pytest.raises(InputError, match="--device cuda: PyTorch finds no usable GPU"):
        machine.choose_device("cuda")


def test_graphs_are_captured_where_every_rank_has_a_third_full_batch_to_replay_them():
    for world_size, flags, expected in ((2, [], True), (3, [], False), (2, ["--no-cuda_graphs"], False)):
        options = parse_options(["--model", "mar_tiny", "--eval_bsz", "20", *flags])
        run = SimpleNamespace(options=options, missing=range(6 * 20 + 2), job=SimpleNamespace(world_size=world_size))
        assert Run.cuda_graphs.fget(run) == expected
