"""`compare.py`: the table and picture of two finished runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare

SETTINGS = {"model": "mar_tiny", "seed": 0, "num_images": 12, "class_labels": None, "class_num": 10}
SCORES = {
    "features": "inception",
    "frechet_inception_distance": 2.0,
    "inception_score_mean": 280.0,
    "inception_score_std": 3.0,
    "precision": 0.8,
    "recall": 0.6,
    "kernel_inception_distance_mean": 0.0002,
    "fd_dinov2": 90.0,
}


def make_run(folder: Path, *, shade: int = 0, settings: dict | None = None, **metrics) -> str:
    """A folder of `metrics.json` and images, and nothing else."""
    (folder / "images").mkdir(parents=True)
    for number in range(12):
        Image.fromarray(np.full((32, 32, 3), shade + number, np.uint8)).save(folder / "images" / f"{number:06d}.png")
    content = {"sampling_seconds": 1.0, "flops_per_image": 2e12, **SCORES, **metrics}
    (folder / "metrics.json").write_text(json.dumps({**content, "settings": {**SETTINGS, **(settings or {})}}))
    return str(folder)


def test_the_table_shows_ratios_and_the_picture_pairs_of_the_same_seed(tmp_path, capsys):
    better = {"frechet_inception_distance": 2.2, "features": "fashion", "sampling_seconds": 0.25}
    runs = make_run(tmp_path / "a", features="fashion"), make_run(tmp_path / "b", shade=100, **better)
    assert compare.main([*runs, "--output", str(tmp_path / "pairs.png")]) == 0
    table = {line[:27].strip(): line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert table["FID"] == ["2.0000", "2.2000", "1.10"]
    shown = [table[name][0] for name in ("Inception Score", "precision", "recall", "KID", "FD-DINOv2")]
    assert shown == ["280.0000", "0.8000", "0.6000", "0.000200", "90.0000"]
    assert table["sampling, s per image"] == ["1.000", "0.250", "0.25"] and "with decoding, s per image" not in table
    pixels, cell = np.array(Image.open(tmp_path / "pairs.png")), 64 + 2  # 32 pixels enlarged to 64, and a gap of 2
    assert [pixels[row * cell + 10, 10, 0] for row in range(3)] == [0, 100, 10]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"settings": {"seed": 1}}, "differ in seed (0 and 1)"),
        ({"settings": {"class_labels": [1, 2]}}, "differ in class_labels"),
        ({"reference": {"path": "b.npz", "sha256": "2"}}, "different statistics (a.npz and b.npz)"),
    ],
)
def test_runs_that_do_not_compare_are_refused(other, message, tmp_path, capsys):
    first = make_run(tmp_path / "a", reference={"path": "a.npz", "sha256": "1"})
    assert compare.main([first, make_run(tmp_path / "b", **other)]) == 2
    assert message in capsys.readouterr().err
    assert compare.main([first, make_run(tmp_path / "without a reference")]) == 0


def test_what_is_no_finished_run_and_a_picture_that_cannot_be_written_are_named(tmp_path, capsys):
    def refusal(*arguments: object) -> str:
        assert compare.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    run = make_run(tmp_path / "a")
    for other in (tmp_path, tmp_path / "a" / "metrics.json", tmp_path / "nowhere"):
        assert f"{other}/metrics.json does not exist: name a run's folder" in refusal(run, other)
    assert "error: [Errno 21] Is a directory:" in refusal(run, run, "--output", tmp_path)
    for file in (tmp_path / "a" / "images").iterdir():
        file.unlink()
    assert "share no images: run both with --save_images" in refusal(run, run, "--output", tmp_path / "pairs.png")
