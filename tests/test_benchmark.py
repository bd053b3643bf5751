"""The benchmark runs without weights, and its numbers belong together."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from PIL import Image

import benchmark
from models import AutoencoderKL
from models.lazymar.flops import count_decoding_flops


def test_a_run_prints_both_methods_and_writes_what_it_measured(tmp_path, capsys):
    output, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    arguments = ["--models", "mar_tiny", "--num_iter", "2", "4", "--num_sampling_steps", "4", "--repeats", "2"]
    assert benchmark.main([*arguments, "--profile", "--output", str(output), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert " mar " in printed and " lazymar " in printed and "linear" in printed
    results = json.loads(output.read_text())["results"]
    assert [(row["num_iter"], row["method"]) for row in results] == [
        (steps, method) for steps in (2, 4) for method in ("mar", "lazymar")
    ]
    for row in results:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["peak_bytes"] > 1e8
    assert sum(results[3]["flops"].values()) < sum(results[2]["flops"].values())
    assert Image.open(plot).width > 300


def test_it_needs_no_package_for_scores(monkeypatch):
    def no_package(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("util.machine.version", no_package)
    assert benchmark.describe(torch.device("cpu"))["torch"] == torch.__version__


def test_decoding_costs_what_the_method_says():
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert count_decoding_flops(vae, 16) == pytest.approx(0.250e12, rel=0.01)  # of KL-16 at 256 pixels


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--num_iter", "300", "--models", "mar_tiny"], "--num_iter"),
        (["--num_sampling_steps", "1001"], "--num_sampling_steps"),
        (["--plot", "speed.txt"], "--plot"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(arguments, named, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_rate", None)
    assert benchmark.main(arguments) == 2
    assert named in capsys.readouterr().err
