"""What a run runs on: the dtype that is fast there, and what a record says of the machine and the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from util import machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# What PyTorch says of a processor: its kind, whether oneDNN has bfloat16 for it, and which instructions it has.
PROCESSORS = {
    "AVX2 alone": ("x86_64", False, (), torch.float32),
    "AVX-512 without bfloat16": ("x86_64", True, (), torch.float32),
    "AVX512-BF16": ("x86_64", True, ("avx512_bf16",), torch.bfloat16),
    "AMX": ("AMD64", True, ("avx512_bf16", "amx_tile"), torch.bfloat16),
    "AMX that oneDNN may not use": ("x86_64", False, ("avx512_bf16", "amx_tile"), torch.float32),
    "Arm with bf16": ("aarch64", True, (), torch.bfloat16),
    "Arm without": ("arm64", False, (), torch.float32),
}


@pytest.mark.parametrize(("processor", "onednn", "instructions", "fast"), PROCESSORS.values(), ids=PROCESSORS)
def test_bfloat16_is_taken_where_the_processor_computes_in_it(processor, onednn, instructions, fast, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions, raising=False)
    assert machine.choose_dtype("auto", CPU) == fast
    assert machine.choose_dtype("float64", CPU) == torch.float64
    assert machine.choose_dtype("auto", GPU) == torch.bfloat16
    with machine.mixed_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == fast


def test_a_pytorch_without_onednn_or_that_says_nothing_means_float32(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    assert machine.choose_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert machine.choose_dtype("auto", CPU) == torch.float32


def test_what_pytorch_says_of_this_processor_is_what_linux_says():
    """Were PyTorch's names to change, bfloat16 would silently be given up."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("only Linux lists a processor's instructions")
    listed = {"amx_bf16", "avx512_bf16", "bf16"} & set(flags.read_text().split())
    assert machine.cpu_computes_in_bfloat16() == bool(listed)


def test_the_record_names_processor_and_code(monkeypatch, tmp_path):
    described = machine.describe(CPU)
    assert f"{torch.get_num_threads()} threads of " in described["processor"]
    assert torch.backends.cpu.get_cpu_capability() in described["processor"]
    assert described["code"] == machine.code_digest()
    for folder in ("models/parts", "diffusion"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "code.py").write_text("x = 1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    digests = [machine.code_digest()]
    for folder in ("models/parts", "diffusion"):
        (tmp_path / folder / "code.py").write_text("x = 1  # a comment")
        digests.append(machine.code_digest())
    assert len(set(digests)) == 3
