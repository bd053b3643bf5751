"""FID and IS are torch-fidelity's own numbers, and bad input to scoring ends in one clear sentence."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn

import score as score_script
from util.errors import InputError
from util.scoring import scores as scoring
from util.scoring.classifier import FEATURE_EXTRACTOR_NAME, FashionClassifier, load_classifier
from util.scoring.scores import FEATURES_DIMS, Statistics, load_extractor, score
from util.training import classifier as training
from util.training import fashion
from util.training.classifier import accuracy, train_classifier
from util.training.fashion import load_fashion_mnist, to_rgb32
from util.weights import download

SAMPLE = Path(__file__).parent / "data" / "fashion_sample.npz"  # 50 of Fashion-MNIST's test images of each class
SHIPPED_STATISTICS = Path(__file__).parents[1] / "pretrained_models/fid_stats/fashion_classifier_stats.npz"


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(SAMPLE) as file:
        return to_rgb32(torch.from_numpy(file["images"])), torch.from_numpy(file["labels"]).long()


def write_images(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(sample, tmp_path_factory) -> tuple[Path, Path]:
    """A: garments with noise, so that its FID is far from 0; B: other garments."""
    images, _ = sample
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 60, images[:12].shape, generator=generator, dtype=torch.uint8)
    return write_images(root / "a", images[:12] // 2 + noise), write_images(root / "b", images[-13:])


def run_score(*arguments: object) -> int:
    return score_script.main([str(argument) for argument in (*arguments, "--device", "cpu")])


@pytest.mark.parametrize("name", ["inception", "fashion"])
def test_scores_of_folders_equal_torch_fidelity(name, folders, inception_weights, tmp_path, capsys):
    a, b = folders
    options = ["--features", name]
    expected_options = {"feature_extractor": FEATURE_EXTRACTOR_NAME}
    if name == "inception":
        options += ["--inception_weights", inception_weights]
        expected_options = {"feature_extractor_weights_path": str(inception_weights)}
    expected = torch_fidelity.calculate_metrics(
        input1=str(a),
        input2=str(b),
        isc=True,
        fid=True,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
        **expected_options,
    )

    statistics, report = tmp_path / "b.npz", tmp_path / "scores.json"
    assert run_score("statistics", b, "--output", statistics, *options) == 0
    assert run_score("evaluate", a, "--statistics", statistics, "--json", report, *options) == 0

    fid, is_mean, is_std = (
        expected[key] for key in (torch_fidelity.KEY_METRIC_FID, *sorted(k for k in expected if "inception_score" in k))
    )
    names = {
        "inception": ("frechet_inception_distance", "inception_score_mean", "inception_score_std"),
        "fashion": ("fid_fashion_classifier", "isc_fashion_classifier_mean", "isc_fashion_classifier_std"),
    }
    found = json.loads(report.read_text())
    assert math.isclose(found[names[name][0]], fid, rel_tol=1e-6)
    assert math.isclose(found[names[name][1]], is_mean, rel_tol=1e-9)
    assert math.isclose(found[names[name][2]], is_std, rel_tol=1e-9)
    assert fid > 1e-3 and is_mean > 1 + 1e-4  # else the comparison would say little
    assert not set(names["inception" if name == "fashion" else "fashion"]) & set(found)
    printed = capsys.readouterr().out
    assert f"{fid:.4f}" in printed and f"{is_mean:.4f} ± {is_std:.4f}" in printed
    assert ("not Inception" in printed) == (name == "fashion")


def test_scores_do_not_depend_on_the_batches(sample):
    images, _ = sample
    extractor = load_extractor("fashion")
    reference = Statistics.load(SHIPPED_STATISTICS, extractor.features_dim)
    whole = score(*extractor(images), reference)
    parts = [torch.cat(outputs) for outputs in zip(*(extractor(batch) for batch in images.split(33)))]
    batched = score(*parts, reference)
    assert math.isclose(batched.fid, whole.fid, rel_tol=1e-4)
    assert math.isclose(batched.is_mean, whole.is_mean, rel_tol=1e-4)


def test_shipped_classifier_and_statistics_know_real_images(sample):
    images, labels = sample
    assert accuracy(load_classifier(), images, labels) >= 0.90
    extractor = load_extractor("fashion")
    reference = Statistics.load(SHIPPED_STATISTICS, extractor.features_dim)
    real = score(*extractor(images), reference)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert real.fid * 10 < score(*extractor(noise), reference).fid
    assert 5 < real.is_mean <= 10


def test_classifier_logits_are_linear_in_its_features(sample):
    classifier = load_classifier()
    with torch.inference_mode():
        features, logits = classifier(sample[0][:8])
        assert features.shape == (8, FEATURES_DIMS["fashion"])
        torch.testing.assert_close(logits, classifier.head(features))


def test_too_few_images_give_none_and_a_reason():
    generator = torch.Generator().manual_seed(0)
    features, logits = torch.rand(300, 4, generator=generator), torch.randn(300, 10, generator=generator)
    reference = Statistics.from_features(features)
    one, nine, many = (score(features[:n], logits[:n], reference) for n in (1, 9, 300))
    assert one.fid is None and one.is_mean is None and len(one.notes) == 2
    assert nine.fid > 0 and nine.is_mean is None and nine.is_std is None and "at least 10" in nine.notes[0]
    assert abs(many.fid) < 1e-6 and many.is_mean > 1 and not many.notes
    assert "covariance" in score(features[:3], logits[:3], reference).notes[0]
    with pytest.raises(InputError, match="at least 2"):
        Statistics.from_features(features[:1])


def test_features_that_are_not_finite_are_refused():
    features = torch.ones(20, 4)
    features[7, 2] = torch.inf
    with pytest.raises(InputError, match="number 7"):
        Statistics.from_features(features)
    with pytest.raises(InputError, match="number 7"):
        score(torch.ones(20, 4), features, Statistics(np.zeros(4), np.eye(4)))


# Statistics files


def test_statistics_come_back_as_saved(tmp_path):
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    saved = Statistics.from_features(features)
    saved.save(tmp_path / "new_folder" / "stats.npz")
    loaded = Statistics.load(tmp_path / "new_folder" / "stats.npz", 6)
    np.testing.assert_array_equal(loaded.mu, saved.mu)
    np.testing.assert_array_equal(loaded.sigma, saved.sigma)
    np.testing.assert_allclose(saved.sigma, np.cov(features.double().numpy().T), rtol=1e-12)
    assert loaded.mu.dtype == loaded.sigma.dtype == np.float64


def test_failed_save_leaves_the_old_statistics(tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    Statistics(np.zeros(3), np.eye(3)).save(path)

    def disk_full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(InputError, match="No space left"):
        Statistics(np.ones(3), np.eye(3)).save(path)
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(Statistics.load(path, 3).mu, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "does not exist"),
        (b"PK\x03\x04 truncated", "cannot be read"),
        ({"mu": np.zeros(3)}, "no mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \[3\] and sigma \[4, 4\]"),
        ({"mu": np.zeros(2048), "sigma": np.eye(3)}, "3 dimensions"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.array([0, None, 0], dtype=object), "sigma": np.eye(3)}, "cannot be read"),
    ],
)
def test_unusable_statistics_are_refused_by_name(arrays, message, tmp_path):
    path = tmp_path / "stats.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays:
        np.savez(path, **arrays)
    with pytest.raises(InputError, match=message) as caught:
        Statistics.load(path, 3)
    assert str(path) in str(caught.value)


# Inception's weights


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickle_that_runs_code_is_refused_as_inception_weights(tmp_path):
    marker = tmp_path / "executed"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        save({"fc.weight": RunsCode(marker)}, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=r"could run code.*--inception_weights"):
            load_extractor("inception", tmp_path / "weights.pth")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(3)}, "does not hold"),
        ([1, 2], "does not hold"),
        (b"PK\x03\x04 cut off", "damaged"),
        (None, "do not exist"),
    ],
)
def test_unusable_inception_weights_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        load_extractor("inception", path)
    assert str(path) in str(caught.value) and "--inception_weights" in str(caught.value)


def test_inception_without_network_names_file_release_and_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(download, "RETRY_WAITS", ())
    refuse = mock.Mock(side_effect=OSError("Network is unreachable"))
    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
    with pytest.raises(InputError) as caught:
        load_extractor("inception")
    for part in (scoring.INCEPTION_FILE, "https://github.com/toshas/torch-fidelity/releases", "--inception_weights"):
        assert part in str(caught.value)
    assert refuse.called


# The command line


@pytest.fixture
def stats(tmp_path) -> Path:
    dim = FEATURES_DIMS["fashion"]
    Statistics(np.zeros(dim), np.eye(dim)).save(tmp_path / "stats.npz")
    return tmp_path / "stats.npz"


def test_bad_folders_and_images_exit_with_2_and_a_sentence(sample, stats, tmp_path, capsys):
    images, _ = sample
    empty = tmp_path / "empty"
    empty.mkdir()
    truncated = write_images(tmp_path / "truncated", images[:5])
    (truncated / "003.png").write_bytes((truncated / "003.png").read_bytes()[:150])
    mixed = write_images(tmp_path / "mixed", images[:5])
    Image.new("RGB", (40, 30)).save(mixed / "004.png")
    large = write_images(tmp_path / "large", torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    for folder, message in [
        (tmp_path / "nowhere", "nowhere is not a folder"),
        (empty, "empty holds no PNG or JPEG"),
        (truncated, "truncated/003.png cannot be read"),
        (mixed, "mixed/004.png is 40 x 30 pixels"),
        (large, "takes 32 x 32 RGB images"),
    ]:
        assert run_score("evaluate", folder, "--statistics", stats, "--features", "fashion") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--statistics", "missing.npz"], "missing.npz does not exist"),
        (["--inception_weights", "file.pth"], "--inception_weights has no use"),
        (["--json", "/proc/none/scores.json"], "cannot write /proc/none/scores.json"),
    ],
)
def test_bad_flags_exit_with_2_before_any_work(arguments, message, folders, stats, capsys, monkeypatch):
    monkeypatch.setattr(score_script, "extract", mock.Mock(side_effect=AssertionError("work has begun")))
    assert run_score("evaluate", folders[0], "--statistics", stats, "--features", "fashion", *arguments) == 2
    assert message in capsys.readouterr().err


def test_absent_device_exits_with_2(folders, stats, capsys):
    arguments = ["evaluate", str(folders[0]), "--statistics", str(stats), "--device", "cuda:99"]
    assert score_script.main(arguments) == 2
    assert "--device cuda:99 is not there" in capsys.readouterr().err


# Fashion-MNIST


def write_idx(path: Path, array: np.ndarray, cut: int | None = None) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes())[:cut])


def test_fashion_mnist_is_read_and_padded(tmp_path, monkeypatch):
    monkeypatch.setitem(fashion.SPLITS, "test", ("t10k", 3))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([9, 0, 4], np.uint8))
    images, labels = load_fashion_mnist(tmp_path, "test")
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == [9, 0, 4]
    for channel in range(3):
        np.testing.assert_array_equal(images[:, channel, 2:-2, 2:-2], pixels)
    assert images.sum() == 3 * int(pixels.sum())  # the border is black


def test_missing_or_damaged_fashion_mnist_is_refused_by_name(tmp_path):
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path, "test")
    for damage in (
        lambda: images.write_bytes(b"<html>"),
        lambda: write_idx(images, np.zeros((10_000, 28, 28), np.uint8), cut=-9),
        lambda: write_idx(images, np.zeros((10, 28, 28), np.uint8)),
    ):
        damage()
        with pytest.raises(InputError, match=images.name):
            load_fashion_mnist(tmp_path, "test")


def test_classifier_file_of_another_network_is_refused(tmp_path):
    classifier = FashionClassifier()
    classifier.head = nn.Linear(3, 3)
    torch.save(classifier.state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"head\.weight"):
        load_classifier(tmp_path / "other.pth")


def test_training_learns_and_a_second_call_continues_it(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_fashion_mnist", lambda folder, split: sample)
    result = train_classifier(tmp_path, steps=30, batch_size=50)
    assert result > 0.3  # 0.1 by chance
    first = load_classifier(tmp_path / "fashion_classifier.safetensors").state_dict()
    assert train_classifier(tmp_path, steps=30, batch_size=50) == result  # nothing left to do
    for name, value in load_classifier(tmp_path / "fashion_classifier.safetensors").state_dict().items():
        assert torch.equal(value, first[name]), name
    with pytest.raises(InputError, match="30 steps"):
        train_classifier(tmp_path, steps=40)


def test_augmentation_only_flips_and_shifts(sample):
    images = sample[0][:40]
    changed = training._flip_and_shift(images, torch.Generator().manual_seed(0))
    for before, after in zip(images, changed):
        allowed = (
            image.roll((down, right), dims=(1, 2))
            for image in (before, before.flip(2))
            for down in range(-2, 3)
            for right in range(-2, 3)
        )
        assert any(torch.equal(after, image) for image in allowed)
    assert not torch.equal(images, changed)
