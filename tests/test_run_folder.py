"""The folder of a run, and images, without any network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import PRESETS
from util.errors import InputError
from util.files import atomic_write
from util.folder import Batch, RunFolder, check_folder, labels_of, open_finished, open_folder
from util.images import decode, image_grid, map_images, to_pixels

SETTINGS = {"seed": 0, "class_labels": [1, 2], "class_num": 10, "num_images": 7, "start_step": 5}


def make_batch(*indices: int, first: bool = False) -> Batch:
    pixels = np.random.default_rng(indices).integers(0, 256, (len(indices), 8, 8, 3), dtype=np.uint8)
    outputs = {"features": np.repeat(np.float32(indices)[:, None], 4, axis=1)}
    seconds = 60.0 if first else 6.0
    return Batch(list(indices), pixels=pixels, outputs=outputs, sample_seconds=seconds, decode_seconds=0.3, first=first)


def begin(path: Path, settings: dict, environment: dict, overwrite: bool = False) -> None:
    with open_folder(path, settings, environment, overwrite=overwrite):
        pass


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run of 7 images, of which a batch of three and a batch of one are done."""
    folder = RunFolder(tmp_path / "run", labels_of(SETTINGS), 7)
    begin(folder.path, SETTINGS, {"torch": "2"})
    assert folder.missing() == [0, 1, 2, 3, 4, 5, 6]
    folder.save(make_batch(0, 1, 2, first=True))
    folder.save(make_batch(6))
    return folder


def test_what_was_saved_is_read_again(folder):
    _, batch = folder.finished()
    assert (batch.indices, batch.sample_seconds, batch.first, len(batch.png_bytes)) == ([6], 6.0, False, 1)
    assert batch.outputs["features"].tolist() == [[6, 6, 6, 6]]
    assert np.array_equal(folder.read_image(6), make_batch(6).pixels[0])
    assert folder.seconds() == pytest.approx(
        {"seconds_per_image": 6.3, "sampling_seconds": 6.0, "decoding_seconds": 0.3, "timed_images": 1}
    )
    assert folder.missing() == [3, 4, 5]
    folder.save(make_batch(3, 4, 5, 6))  # another process wrote the last image, too, with other images before it
    assert folder.outputs()["features"][:, 0].tolist() == list(range(7)) and not folder.missing()


def test_other_settings_are_named_and_another_environment_is_printed(folder, capsys):
    begin(folder.path, {"seed": 0}, {"torch": "2"})
    assert not capsys.readouterr().out
    begin(folder.path, SETTINGS, {"torch": "3", "processor": "other"})
    assert "images from here on may be rounded differently (torch 2 there, 3 now)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"class_labels \[1, 2\] there, \[2, 1\] now"):
        check_folder(folder.path, {**SETTINGS, "class_labels": [2, 1]})


def test_only_a_folder_without_images_takes_other_settings(folder):
    for file in (folder.path / "batches").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="seed 0 there, 1 now"):
        begin(folder.path, {**SETTINGS, "seed": 1}, {})
    for file in (folder.path / "images").iterdir():
        file.unlink()
    begin(folder.path, {**SETTINGS, "seed": 1}, {})
    assert json.loads((folder.path / "run.json").read_text())["settings"]["seed"] == 1


def test_overwriting_leaves_what_is_not_of_the_run(folder):
    (folder.path / "run.json").write_text('{"settings": ')
    with pytest.raises(InputError, match=r"run\.json is damaged .* --overwrite"):
        begin(folder.path, SETTINGS, {})
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "plots").mkdir()
    (folder.path / "plots" / "fid.png").write_text("mine")
    (folder.path / "images" / "holiday.jpg").write_text("mine too")
    begin(folder.path, {"seed": 1}, {}, overwrite=True)
    left = sorted(path.name for path in folder.path.rglob("*.*"))
    assert left == [".lock", "fid.png", "holiday.jpg", "notes.txt", "run.json"]
    assert json.loads((folder.path / "run.json").read_text())["settings"] == {"seed": 1}


def test_a_folder_that_has_gone_is_not_made_again(folder, tmp_path):
    folder.path.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"cannot write to {folder.path}: No such file or directory; nothing written"):
        folder.save(make_batch(3))
    assert not folder.path.exists()


def test_a_finished_run_is_read_from_its_folder_alone(folder):
    folder.write("metrics.json", json.dumps({"settings": SETTINGS, "fid": 2.0}).encode())
    settings, metrics, opened = open_finished(folder.path)
    assert settings == SETTINGS and metrics["fid"] == 2 and opened.labels == [1, 2, 1, 2, 1, 2, 1]
    assert opened.missing() == [3, 4, 5] and opened.read_image(1).shape == (8, 8, 3)
    (folder.path / "images" / "000001.png").write_bytes(bytes(200))
    with pytest.raises(InputError, match=r"000001\.png cannot be read .* delete it and repeat the run's command"):
        opened.read_image(1)
    (folder.path / "metrics.json").write_text('{"fid": 2.0}')
    with pytest.raises(InputError, match=r"metrics\.json is damaged .* repeat the run's command"):
        open_finished(folder.path)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError), atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise ValueError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


# Images


def test_pixels_are_rounded_to_the_nearest():
    values = torch.tensor([-1.2, -1.0, -1 + 2 * 0.49 / 255, -1 + 2 * 0.51 / 255, 0.0, 1.0, 7.0])
    assert to_pixels(values.expand(1, 3, 1, -1))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_the_grid_shows_each_image_in_its_place():
    grid = image_grid([np.full((4, 4, 3), shade, np.uint8) for shade in range(10, 60, 10)], 3, gap=2, min_size=8)
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3) and grid[:2].min() == 255
    assert [grid[5 + 10 * (n // 3), 5 + 10 * (n % 3), 0] for n in range(6)] == [10, 20, 30, 40, 50, 255]


def test_a_decoded_image_depends_neither_on_threads_nor_on_its_batch():
    torch.manual_seed(0)
    vae = PRESETS["mar_tiny"].make_vae().eval()
    latents, threads, decoded = torch.randn(3, 2, 16, 16), torch.get_num_threads(), []
    assert torch.equal(torch.cat(map_images(lambda part: part * 2, latents)), latents * 2)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        decoded += [decode(vae, latents), torch.cat([decode(vae, one) for one in latents.split(1)])]
    torch.set_num_threads(threads)
    assert all(torch.equal(images, decoded[0]) for images in decoded)
