"""The folder of a run, and images, without any network."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from models import PRESETS, AutoencoderKL
from util.errors import InputError
from util.files import atomic_write
from util.folder import Batch, RunFolder, check_folder, labels_of, locked, open_finished, open_folder
from util.images import decode, image_grid, map_images, to_uint8
from util.options import parse_options

SETTINGS = {"seed": 0, "class_labels": [1, 2], "class_num": 10, "num_images": 7, "start_step": 5}
WANTED = {"features": "name digest", "logits": "name digest"}


def make_batch(folder: RunFolder, *indices: int) -> Batch:
    chance = np.random.default_rng(indices)
    pixels = chance.integers(0, 256, (len(indices), 8, 8, 3), dtype=np.uint8)
    features = np.repeat(np.float32(indices)[:, None], 4, axis=1)
    outputs = {"features": features, "logits": features[:, :2]}
    labels = [folder.labels[index] for index in indices]
    return Batch(list(indices), labels, pixels=pixels, outputs=outputs, sample_seconds=6.0, decode_seconds=0.3)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run of 7 images, of which a batch of three and a batch of one are done."""
    folder = RunFolder(tmp_path / "run", labels_of(SETTINGS), 7, WANTED)
    with locked(folder.path):
        open_folder(folder.path, SETTINGS, {"torch": "2"})
    assert folder.unfinished(4) == [[0, 1, 2, 3], [4, 5, 6]]
    folder.save(dataclasses.replace(make_batch(folder, 0, 1, 2), first=True, sample_seconds=60.0))
    folder.save(make_batch(folder, 6))
    return folder


def test_what_was_saved_is_read_again(folder):
    assert folder.missing() == [3, 4, 5]
    assert folder.unfinished(3) == [[3, 4, 5]] and folder.unfinished(2) == [[3, 4], [5]]
    _, batch = folder.finished()
    assert (batch.indices, batch.labels, batch.sample_seconds, batch.first) == ([6], [1], 6.0, False)
    assert batch.outputs["features"].tolist() == [[6, 6, 6, 6]] and batch.outputs["logits"].shape == (1, 2)
    assert np.array_equal(folder.resume([6]).pixels, make_batch(folder, 6).pixels)
    assert folder.resume([6]).outputs and folder.resume([3, 4, 5]) == Batch([3, 4, 5], [2, 1, 2])
    assert folder.seconds() == pytest.approx(
        {"seconds_per_image": 6.3, "sampling_seconds": 6.0, "decoding_seconds": 0.3, "timed_images": 1}
    )
    folder.save(make_batch(folder, 3, 4, 5))
    assert folder.outputs("features")[:, 0].tolist() == list(range(7)) and not folder.missing()


def test_a_record_that_another_process_wrote_late_counts_once(folder):
    folder.save(make_batch(folder, 3, 4, 5, 6))  # its images come before those of the record of image 6
    assert not folder.missing() and folder.outputs("features")[:, 0].tolist() == list(range(7))


def test_features_of_another_extractor_are_not_taken(folder):
    other = dataclasses.replace(folder, wanted={**WANTED, "dinov2": "another"})
    assert not list(other.finished()) and other.unfinished(2) == [[0, 1, 2], [6], [3, 4], [5]]
    assert other.resume([0, 1, 2]).sample_seconds == 60 and other.resume([0, 1, 2]).pixels is not None
    assert folder.unfinished(2) == [[3, 4], [5]]
    # Without PNGs they cannot be computed later.
    assert dataclasses.replace(other, num_saved=2).unfinished(9) == [[0, 1, 2, 3, 4, 5, 6]]


def test_other_settings_are_named_and_another_environment_is_printed(folder, capsys):
    open_folder(folder.path, {"seed": 0}, {"torch": "2"})
    assert not capsys.readouterr().out
    open_folder(folder.path, SETTINGS, {"torch": "3", "processor": "other"})
    assert "images from here on may be rounded differently (torch 2 there, 3 now)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"class_labels \[1, 2\] there, \[2, 1\] now"):
        check_folder(folder.path, {**SETTINGS, "class_labels": (2, 1)})


def test_a_folder_without_a_finished_batch_takes_other_settings_and_forgets_their_images(folder):
    for file in (folder.path / "batches").iterdir():
        file.unlink()
    open_folder(folder.path, {**SETTINGS, "seed": 1}, {})
    assert folder.resume([0, 1, 2]).pixels is None
    folder.save(make_batch(folder, 0))
    with pytest.raises(InputError, match="seed 1 there, 0 now"):
        open_folder(folder.path, SETTINGS, {})


def test_overwriting_leaves_what_is_not_of_the_run(folder):
    (folder.path / "run.json").write_text('{"settings": ')
    with pytest.raises(InputError, match=r"run\.json is damaged .* --overwrite"):
        open_folder(folder.path, SETTINGS, {})
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "images" / "holiday.jpg").write_text("mine too")
    open_folder(folder.path, {"seed": 1}, {}, overwrite=True)
    left = sorted(path.name for path in folder.path.rglob("*.*"))
    assert left == [".lock", "holiday.jpg", "notes.txt", "run.json"]
    assert json.loads((folder.path / "run.json").read_text())["settings"] == {"seed": 1}


def test_overwriting_at_each_restart_is_refused(monkeypatch):
    parse_options(["--overwrite"])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--overwrite would delete the images at each restart by torchrun"):
        parse_options(["--overwrite"])


def test_a_finished_run_is_read_from_its_folder_alone(folder):
    folder.write("metrics.json", json.dumps({"settings": SETTINGS, "fid": 2.0}).encode())
    settings, metrics, opened = open_finished(folder.path)
    assert settings == SETTINGS and metrics["fid"] == 2 and opened.labels == [1, 2, 1, 2, 1, 2, 1]
    assert opened.missing() == [3, 4, 5] and opened.read_image(1).shape == (8, 8, 3)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError), atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise ValueError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


# Images


def test_pixels_are_rounded_to_the_nearest():
    values = torch.tensor([-1.2, -1.0, -1 + 2 * 0.49 / 255, -1 + 2 * 0.51 / 255, 0.0, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_the_grid_shows_each_image_in_its_place():
    grid = image_grid([np.full((4, 4, 3), shade, np.uint8) for shade in range(10, 60, 10)], 3, gap=2, min_size=8)
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3) and grid[:2].min() == 255
    assert [grid[5 + 10 * (n // 3), 5 + 10 * (n % 3), 0] for n in range(6)] == [10, 20, 30, 40, 50, 255]


def test_a_decoded_image_depends_neither_on_threads_nor_on_its_batch():
    torch.manual_seed(0)
    vae = AutoencoderKL(**PRESETS["mar_tiny"].vae).eval()
    latents, threads, decoded = torch.randn(3, 2, 16, 16), torch.get_num_threads(), []
    assert torch.equal(torch.cat(map_images(lambda part: part * 2, latents)), latents * 2)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        decoded += [decode(vae, latents), torch.cat([decode(vae, one) for one in latents.split(1)])]
    torch.set_num_threads(threads)
    assert all(torch.equal(images, decoded[0]) for images in decoded)
