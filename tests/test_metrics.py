"""All scores are torch-fidelity's own numbers, and a metric is one entry of a table."""

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import nn

import score as program
from util import download
from util.errors import InputError
from util.extractors import load_extractor
from util.metrics import Statistics, groups_of_images, score, score_table

ROOT = Path(__file__).parents[1]
FASHION = ["--features", "fashion"]


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """50 of Fashion-MNIST's test images of each class, uint8 [500, 3, 32, 32], and their classes."""
    with np.load(ROOT / "tests/data/fashion_sample.npz") as file:
        images, labels = (torch.from_numpy(file[name]) for name in ("images", "labels"))
    return nn.functional.pad(images[:, None].expand(-1, 3, -1, -1), (2, 2, 2, 2)).contiguous(), labels


def write_images(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """24 images as if generated, which are less varied than real ones and partly noise, and 30 real ones."""
    garments, _ = sample()
    noise = torch.randint(0, 90, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generated = garments[3:147:6] // 2 + noise * (torch.arange(24) % 3 == 0)[:, None, None, None]
    return generated.to(torch.uint8), garments[:500:17]


@pytest.fixture(scope="session")
def folders(images, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "generated", images[0]), write_images(root / "real", images[1])


@pytest.fixture(scope="session")
def arrays(images, tmp_path_factory) -> tuple[Path, Path]:
    """The same images as ADM's .npz files."""
    paths = tuple(tmp_path_factory.mktemp("arrays") / f"{name}.npz" for name in ("generated", "real"))
    for path, each in zip(paths, images):
        np.savez_compressed(path, arr_0=each.permute(0, 2, 3, 1).numpy())
    return paths


def load_from_hub(repository: str, name: str) -> nn.Module:
    """Make a network with random weights in place of what PyTorch's hub would fetch."""
    assert (repository, name) == ("facebookresearch/dinov2", "dinov2_vitl14")
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 14, 14), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())


def run_score(*arguments: object) -> int:
    return program.main([*map(str, arguments), "--device", "cpu"])


def evaluate(generated: Path, real: Path, *options: object) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "scores.json"
        assert run_score("evaluate", generated, "--reference", real, "--json", report, *options) == 0
        return json.loads(report.read_text())


def by_torch_fidelity(generated: Path, real: Path, **options: object) -> dict[str, float]:
    return torch_fidelity.calculate_metrics(
        input1=str(generated), input2=str(real), fid=True, cuda=False, save_cpu_ram=True, verbose=False, **options
    )


# The numbers


@pytest.mark.parametrize("kind", ["folders", "arrays", "statistics"])
def test_all_scores_equal_torch_fidelity(kind, folders, arrays, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "load", load_from_hub)
    options = {"isc": True, "kid": True, "prc": True, "kid_subset_size": 24, "feature_extractor": "fashion-classifier"}
    expected = by_torch_fidelity(*folders, **options)
    dinov2 = by_torch_fidelity(*folders, feature_extractor="dinov2-vit-l-14")["frechet_inception_distance"]
    generated, real = arrays if kind == "arrays" else folders
    if kind == "statistics":
        real = tmp_path / "real.npz"
        flags = ["--output", real, "--keep_features", 30, "--fd_dinov2"]
        assert run_score("statistics", folders[1], *flags, *FASHION) == 0
    found = evaluate(generated, real, "--precision_recall", "--kid", "--fd_dinov2", *FASHION)
    for name in expected:
        assert math.isclose(found[name], expected[name], rel_tol=1e-5), name
    assert math.isclose(found["fd_dinov2"], dinov2, rel_tol=1e-4)
    assert expected["precision"] != expected["recall"]  # so that an exchange would be noticed
    kid, printed = found["kernel_inception_distance_mean"], capsys.readouterr().out
    assert f"recall           {expected['recall']:.4f}\nKID              {kid:.6f}\n" in printed
    assert "Fashion-MNIST classifier, not Inception\n" in printed


def test_scores_by_inception_equal_torch_fidelity(images, inception_weights, tmp_path, capsys):
    few = [write_images(tmp_path / name, each[:10]) for name, each in zip("ab", images)]
    options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(inception_weights)}
    expected = by_torch_fidelity(*few, isc=True, kid=True, prc=True, kid_subset_size=10, **options)
    found = evaluate(*few, "--precision_recall", "--kid", "--inception_weights", inception_weights)
    for name in expected:
        assert math.isclose(found[name], expected[name], rel_tol=1e-5), name
    assert expected["frechet_inception_distance"] > 1 and found["features"] == "inception"
    assert "features: Inception\n" in capsys.readouterr().out


def score_features(generated: torch.Tensor, real: torch.Tensor, *names: str, **options: object) -> dict[str, object]:
    """Score features [N, F], with logits at random."""
    logits = torch.randn(len(generated), 10, generator=torch.Generator().manual_seed(1))
    reference = Statistics.from_features(real, keep=len(real))
    return score({"features": generated, "logits": logits}, reference, names, **options)


def test_too_few_images_give_none_and_infinite_features_are_refused():
    features = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    one, nine, many = (score_features(features[:count], features) for count in (1, 9, 300))
    assert one["frechet_inception_distance"] is None is one["inception_score_mean"]
    assert nine["frechet_inception_distance"] > 0 and "Inception Score  too few images" in score_table(
        nine, "inception"
    )
    assert abs(many["frechet_inception_distance"]) < 1e-6 and many["inception_score_mean"] > 1
    assert score_features(features, features[:3], "precision_recall")["recall"] is None
    with pytest.raises(InputError, match="features of 1 images are not finite, first of number 7"):
        score_features(features.index_fill(0, torch.tensor(7), torch.inf), features)


# The Fashion-MNIST classifier


def test_the_shipped_classifier_and_statistics_know_real_images():
    images, labels = sample()
    extractor = load_extractor("fashion")
    reference = Statistics.load(ROOT / "pretrained_models/fid_stats/fashion_classifier_stats.npz", 128)
    real, noise = extractor(images), extractor(torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8))
    fids = [score(each, reference)["frechet_inception_distance"] for each in (real, noise)]
    assert (real["logits"].argmax(1) == labels).float().mean() >= 0.90 and fids[0] * 10 < fids[1]
    torch.testing.assert_close(extractor(images[7:8])["features"], real["features"][7:8])
    head = extractor.networks["features", "logits"].head
    torch.testing.assert_close(real["logits"], head(real["features"]))
    identity = extractor.identity
    head.bias[0] += 1
    assert identity.startswith("FashionClassifier ") and identity != extractor.identity


# Standard errors


def test_standard_errors_are_those_of_the_mean_where_that_is_known():
    """Precision against a fixed reference is a mean over images, whose jackknife is the standard error over groups."""
    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(200, 4, generator=generator) * 1.5, torch.randn(100, 4, generator=generator)
    labels = [index % 5 for index in range(200)]
    scores = score_features(features, real, "precision_recall", labels=labels, standard_errors=True)
    groups = groups_of_images(labels)
    means = [score_features(features[groups == group], real, "precision_recall")["precision"] for group in range(10)]
    errors = scores["standard_errors"]
    assert math.isclose(errors["precision"], np.std(means, ddof=1) / math.sqrt(10), rel_tol=1e-5)
    assert errors.keys() == {"frechet_inception_distance", "inception_score_mean", "precision", "recall"}
    assert all(0 < error < 1 for error in errors.values())
    line = f"precision        {scores['precision']:.4f} (standard error {errors['precision']:.4g})"
    assert line in score_table(scores, "inception")


def test_each_group_has_as_many_images_of_each_class():
    for num_classes in (1, 7, 10, 100, 1000):
        labels = np.arange(300) % num_classes
        groups = groups_of_images(labels)
        counts = np.array([np.bincount(labels[groups == group], minlength=num_classes) for group in range(10)])
        assert (counts.sum(axis=1) == 30).all() and (np.ptp(counts, axis=0) <= 1).all()


# torch-fidelity and the weights


@pytest.mark.parametrize("version", ["0.3.0", "0.4.0-beta", None])
def test_a_torch_fidelity_that_is_too_old_or_missing_is_refused(version, folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", version and mock.Mock(__version__=version))
    assert run_score("evaluate", folders[0], "--reference", folders[1]) == 2
    assert capsys.readouterr().err.startswith("error: scores need torch-fidelity 0.4.0 or later: run `pip install")


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.abort, ()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unusable_weights_of_inception_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    for content in (RunsCode(), {"fc.weight": torch.zeros(3)}, [1, 2], {"x": RunsCode()}):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"cannot be loaded .* --inception_weights") as refused:
            load_extractor("inception", path)
        assert "weights_only" not in str(refused.value)


def test_without_network_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(download, "RETRY_WAITS", ())
    monkeypatch.setattr(download.urllib.request, "urlopen", mock.Mock(side_effect=OSError("Network is unreachable")))
    monkeypatch.setattr(torch.hub, "load", mock.Mock(side_effect=OSError("Network is unreachable")))
    with pytest.raises(InputError, match=f"cannot fetch {tmp_path}.* from https://github.com/toshas/torch-fidelity"):
        load_extractor("inception")
    with pytest.raises(InputError, match=f"Network is unreachable.*copy PyTorch's hub folder, {tmp_path}"):
        load_extractor("fashion", with_dinov2=True)
