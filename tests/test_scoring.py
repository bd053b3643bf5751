"""score.py: every set of images is read whole and without loss, or refused in one sentence before any work."""

import json
import math
import pickle
import struct
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import FASHION, RunsCode, arrays, evaluate, folders, images, run_score, write_images
from torch import nn

import score as program
from util.image_sets import open_images
from util.metrics import Statistics

FID = "frechet_inception_distance"
__all__ = ["arrays", "folders", "images"]  # fixtures


def refusal(capsys, *arguments: object) -> str:
    """Run a command that is refused; return its one sentence."""
    capsys.readouterr()
    assert program.main([*map(str, arguments)]) == 2
    *bars, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all("extracting features" in bar for bar in bars if bar)
    return error


# Folders


def test_class_subfolders_are_read_whole(images, folders, tmp_path, capsys):
    for index, image in enumerate(images[1]):
        (tmp_path / "nested" / f"n{index % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "nested" / f"n{index % 3}" / f"{index:03d}.PNG")
    (tmp_path / "nested" / "classes.txt").write_text("no image")
    whole = evaluate(folders[0], folders[1], *FASHION)
    assert run_score("statistics", tmp_path / "nested", "--output", tmp_path / "real.npz", *FASHION) == 0
    printed = capsys.readouterr().out
    assert "30 images of" in printed and "1 in all" in printed and "nested/classes.txt" in printed
    for real_images in (tmp_path / "nested", tmp_path / "real.npz"):
        found = evaluate(folders[0], real_images, *FASHION)
        assert math.isclose(found[FID], whole[FID], rel_tol=1e-6)


def png_of_16_bits() -> bytes:
    """A PNG file of 32 x 32 RGB pixels of 16 bits at random, which Pillow cannot write."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 1 + 32 * 6), np.uint8)
    pixels[:, 0] = 0  # no filter
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels.tobytes())), (b"IEND", b""))
    content = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def test_pixels_that_8_bit_rgb_cannot_hold_are_refused_by_name(tmp_path, images, capsys):
    rgb = Image.fromarray(images[1][0].permute(1, 2, 0).numpy())
    rgba, palette = rgb.convert("RGBA"), rgb.quantize(16)
    rgba.putalpha(200)
    for name, write in {
        "16-bit grey": Image.fromarray(np.full((32, 32), 999, np.uint16)).save,
        "16-bit RGB": lambda path: path.write_bytes(png_of_16_bits()),
        "transparent": rgba.save,
        "transparent palette": lambda path: palette.save(path, transparency=0),
        "CMYK": lambda path: rgb.convert("CMYK").save(path, format="JPEG"),
    }.items():
        folder = write_images(tmp_path / name, images[1][:12])
        write(folder / "004.png")
        error = refusal(capsys, "evaluate", folder, "--reference", folder, *FASHION)
        assert f"{name}/004.png cannot be read as 8-bit RGB without loss" in error, name


def test_images_without_loss_are_read_as_they_are_whole_and_in_order(tmp_path, folders, images):
    rgb = Image.fromarray(images[1][0].permute(1, 2, 0).numpy())
    for name, image in {"L": rgb.convert("L"), "P": rgb.quantize(256), "RGBA": rgb.convert("RGBA")}.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png")
        (batch,) = open_images(tmp_path / name).batches(5)
        assert torch.equal(batch[0], images[1][0]), name
    for size in (1, 5, 24, 50):
        batches = list(open_images(folders[0]).batches(size))
        assert max(map(len, batches)) == min(size, 24) and torch.equal(torch.cat(batches), images[0])


# Files of statistics, and export


def test_statistics_come_back_as_saved_and_the_same_sample_is_drawn(folders, tmp_path):
    for name, keep in (("first", 9), ("second", 9), ("without", 0)):
        output = tmp_path / "new_folder" / f"{name}.npz"
        assert run_score("statistics", folders[1], "--output", output, "--keep_features", keep, *FASHION) == 0
    first, second, without = (Statistics.load(file, 128) for file in sorted((tmp_path / "new_folder").iterdir()))
    assert first.features.shape == (9, 128) and first.features.dtype == np.float32
    np.testing.assert_array_equal(first.features, second.features)
    assert without.features is None and without.mu.dtype == without.sigma.dtype == np.float64


def test_mean_and_covariance_in_adms_reference_file_are_taken_as_they_are(arrays, tmp_path, capsys):
    with np.load(arrays[1]) as file:
        np.savez(tmp_path / "adm.npz", arr_0=file["arr_0"], mu=np.full(128, 0.5), sigma=np.eye(128), mu_s=0)
    flags = ["--output", tmp_path / "stats.npz", "--keep_features", 30, *FASHION]
    assert run_score("statistics", tmp_path / "adm.npz", *flags) == 0
    statistics = Statistics.load(tmp_path / "stats.npz", 128, ["precision_recall"])
    assert (statistics.mu == 0.5).all() and (statistics.sigma == np.eye(128)).all()
    assert "holds mu and sigma, which are taken as they are" in capsys.readouterr().out


def test_images_are_exported_shuffled_and_whole(images, folders, arrays, tmp_path):
    order = np.random.RandomState(3).permutation(24)
    assert not (order == np.arange(24)).all()
    for source in (folders[0], arrays[0]):
        assert program.main(["export", str(source), "--output", str(tmp_path / "out.npz"), "--seed", "3"]) == 0
        with np.load(tmp_path / "out.npz") as file:
            assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
            np.testing.assert_array_equal(file["arr_0"], images[0].permute(0, 2, 3, 1).numpy()[order])


def test_the_folder_of_a_run_is_read_if_all_its_images_are_there(images, tmp_path, capsys):
    write_images(tmp_path / "images", images[0])
    settings = {"num_images": 24, "class_labels": None, "class_num": 10}
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "grid.png").write_bytes(b"no image of the run")
    command = ["export", tmp_path, "--output", tmp_path / "out.npz"]
    assert "metrics.json does not exist" in refusal(capsys, *command)
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": settings}))
    assert program.main([*map(str, command)]) == 0
    (tmp_path / "images" / "003.png").unlink()
    assert "lacks images, and holds 23" in refusal(capsys, *command)


# Bad input


@pytest.fixture(scope="module")
def bad(images, tmp_path_factory) -> Path:
    """A folder of all kinds of files that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    write_images(root / "one", images[1][:1])
    write_images(root / "larger", nn.functional.interpolate(images[1], scale_factor=2))
    mixed, damaged = (write_images(root / name, images[1][:5]) / "003.png" for name in ("mixed", "damaged"))
    Image.new("RGB", (40, 30)).save(mixed)
    damaged.write_bytes(damaged.read_bytes()[:150])
    for file in sorted(write_images(root / "program", images[1][:2]).iterdir()):
        Image.new("RGB", (32, 32)).save(file, format="EPS")  # which Pillow would give to Ghostscript
    (root / "pickle.npz").write_bytes(pickle.dumps(RunsCode()))
    (root / "empty").mkdir()
    mu, sigma = np.zeros(128), np.eye(128)
    for name, contents in {
        "floats": {"arr_0": np.zeros((4, 32, 32, 3), np.float32)},
        "flipped": {"arr_0": np.zeros((8, 32, 32, 3), np.uint8)},
        "plain": {"mu": mu, "sigma": sigma},
        "inception": {"mu": np.zeros(2048), "sigma": np.eye(2048)},
        "nan": {"mu": mu * np.nan, "sigma": sigma},
        "objects": {"mu": np.array([RunsCode()]), "sigma": sigma},
    }.items():
        np.savez(root / f"{name}.npz", **contents)
    content = (root / "flipped.npz").read_bytes()
    (root / "flipped.npz").write_bytes(content[:9000] + b"\1" + content[9001:])
    return root


@pytest.mark.parametrize(
    ("generated", "real", "flags", "message"),
    [
        ("", "plain.npz", "--kid", "FOLDER_OR_NPZ --keep_features 10000 --fd_dinov2"),
        ("", "plain.npz", "--fd_dinov2", "it lacks dinov2_mu; it lacks dinov2_sigma"),
        ("", "inception.npz", "", "mu is [2048], not finite numbers of 128 features"),
        ("", "nan.npz", "", "mu is [128], not finite numbers of 128 features"),
        ("", "objects.npz", "", "objects.npz cannot be used"),
        ("", "pickle.npz", "", "pickle.npz is no folder, and no .npz file"),
        ("flipped.npz", "", "", "flipped.npz is no folder, and no .npz file that can be read"),
        ("floats.npz", "", "", "floats.npz holds arr_0 of float32 [4, 32, 32, 3], not uint8"),
        ("", "larger", "", "shapes, (32, 32, 3) and (64, 64, 3), differ"),
        ("empty", "", "", "empty holds no PNG or JPEG images"),
        ("nowhere", "", "", "nowhere is no folder, and no .npz file"),
        ("", "", "--batch_size 0", "--batch_size: must be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(generated, real, flags, message, bad, folders, capsys, monkeypatch):
    monkeypatch.setattr(program, "load_extractor", mock.Mock(side_effect=AssertionError("work has begun")))
    arguments = [bad / generated if generated else folders[0], "--reference", bad / real if real else folders[1]]
    error = refusal(capsys, "evaluate", *arguments, *FASHION, *flags.split())
    assert message in error
    assert not any(advice in error for advice in ("allow_pickle", "weights_only", "unsafe"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("statistics {real} --keep_features 31 --features fashion", "30 images, not at least 31 (--keep_features)"),
        ("statistics {bad}/one --features fashion", "1 images, not at least 2"),
        ("statistics {bad}/plain.npz", "plain.npz holds no images"),
        ("statistics {bad}/larger --features fashion", "takes 32 x 32 RGB images"),
        ("statistics {bad}/damaged --features fashion", "damaged/003.png cannot be read as 8-bit RGB"),
        ("statistics {bad}/program --features fashion", "000.png cannot be read as 8-bit RGB without loss (cannot"),
        ("statistics {bad}/mixed --features fashion", "mixed/003.png is (30, 40, 3), but the first image (32, 32, 3)"),
        ("export {bad}/plain.npz", "plain.npz holds no images"),
    ],
)
def test_bad_input_to_the_other_commands_is_refused(arguments, message, bad, folders, capsys):
    command = arguments.format(bad=bad, real=folders[1]).split()
    assert message in refusal(capsys, *command, "--output", bad / "out.npz")
