"""benchmark.py runs without weights, and its numbers belong together."""

import json

import pytest

import benchmark


def test_a_run_prints_all_methods_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "speed.json"
    arguments = ["--models", "mar_tiny", "--num_iter", "2", "4", "--num_sampling_steps", "4", "--repeats", "2"]
    arguments += ["--no-cuda_graphs", "--output", str(output)]
    assert benchmark.main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert " mar " in printed and " lazymar " in printed and "TFLOP/s" in printed
    results = json.loads(output.read_text())["results"]
    assert [(row["num_iter"], row["method"]) for row in results] == [
        (steps, method) for steps in (2, 4) for method in ("mar", "lazymar")
    ]
    for row in results:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["matmul_rate"] > 0 and row["num_iter"] in (2, 4)
    assert results[3]["tflops"] < results[2]["tflops"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--num_iter", "300", "--models", "mar_tiny"], "--num_iter"),
        (["--method", "disa+gtr"], "--method"),
        (["--output", "tests"], "tests"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(arguments, named, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_rate", None)
    assert benchmark.main(arguments) == 2
    assert named in capsys.readouterr().err
