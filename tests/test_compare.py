"""`compare.py`: the table and picture of two finished runs."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

import compare
from util.scoring.scores import Scores


def make_run(folder, *, seed: int = 0, seconds: float = 1.0, fid: float = 10.0, shade: int = 0):
    (folder / "images").mkdir(parents=True)
    for number in range(12):
        Image.fromarray(np.full((32, 32, 3), shade + number, np.uint8)).save(folder / "images" / f"{number:06d}.png")
    metrics = {
        "fid_fashion_classifier": fid,
        "isc_fashion_classifier_mean": 6.0,
        "isc_fashion_classifier_std": 0.1,
        "sampling_seconds": seconds,
        "flops_per_image": 2e12,
        "settings": {"model": "mar_tiny", "seed": seed, "num_images": 12},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_table_shows_ratios_and_the_picture_pairs_of_the_same_seed(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seconds=0.25, fid=11.0, shade=100)]
    picture = tmp_path / "pairs.png"
    assert compare.main([*map(str, runs), "--output", str(picture)]) == 0
    table = {line[:26].strip(): line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert table["FID*"] == ["10.000", "11.000", "1.10"]
    assert table["sampling, s per image"] == ["1.000", "0.250", "0.25"]
    pixels = np.array(Image.open(picture))
    cell = 64 + 2  # 32 pixels are enlarged to 64, with a gap of 2
    assert [pixels[row * cell + 10, 10, 0] for row in range(3)] == [0, 100, 10]


def test_an_unfinished_run_is_named(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    (runs[1] / "metrics.json").unlink()
    assert compare.main(list(map(str, runs))) == 2
    assert "metrics.json" in capsys.readouterr().err


def test_runs_of_different_seeds_are_not_compared(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    assert compare.main(list(map(str, runs))) == 2
    assert "seed" in capsys.readouterr().err


def test_scores_against_different_references_are_not_compared(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    for run, digest in zip(runs, ("1", "2")):
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["reference"] = {"path": f"{run.name}.npz", "sha256": digest}
        (run / "metrics.json").write_text(json.dumps(metrics))
    assert compare.main(list(map(str, runs))) == 2
    assert "different statistics (a.npz and b.npz)" in capsys.readouterr().err
    assert compare.main([str(runs[0]), str(make_run(tmp_path / "of an earlier version"))]) == 0


def test_what_is_no_folder_and_a_picture_that_cannot_be_written_are_named(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    assert compare.main([str(runs[0] / "metrics.json"), str(runs[1])]) == 2
    assert "metrics.json does not exist: name a run's folder" in capsys.readouterr().err
    assert compare.main([*map(str, runs), "--output", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}" in capsys.readouterr().err


def test_scores_by_inception_are_shown_and_scores_of_two_kinds_refused(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    for run in runs:
        metrics = json.loads((run / "metrics.json").read_text())
        scores = Scores(2.0, 280.0, 3.0, precision=0.8, recall=0.6, kid_mean=0.0002, kid_std=0.1, fd_dinov2=90.0)
        metrics = {**metrics, **scores.metrics("inception")}
        (run / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if "fashion" not in k}))
    assert compare.main(list(map(str, runs))) == 0
    table = {line[:26].strip(): line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert table["FID"] == ["2.000", "2.000", "1.00"] and table["IS"][0] == "280.000"
    assert (table["precision"][0], table["recall"][0]) == ("0.800", "0.600")
    assert (table["KID"][0], table["FD-DINOv2"][0]) == ("0.00020", "90.000")
    other = make_run(tmp_path / "c")
    assert compare.main([str(runs[0]), str(other)]) == 2
    assert "scored differently (inception and fashion)" in capsys.readouterr().err
