"""Precision, recall, KID and FD-DINOv2 are torch-fidelity's own numbers, from every kind of input, or are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from test_scoring import run_score, write_images
from torch import nn

import score as score_script
from util.errors import InputError
from util.scoring import scores as scoring
from util.scoring.classifier import FEATURE_EXTRACTOR_NAME
from util.scoring.jackknife import groups_of_images
from util.scoring.scores import Metrics, Scores, Statistics, precision_and_recall, score, with_standard_errors
from util.scoring.sources import export, open_images

ALL = ["--precision_recall", "--kid", "--fd_dinov2"]
FASHION = ["--features", "fashion"]


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Real garments [30, 3, 32, 32], and 24 that are less varied and in part noise, as generated ones would be."""
    with np.load(Path(__file__).parent / "data" / "fashion_sample.npz") as file:
        garments = torch.from_numpy(file["images"])[:, None].expand(-1, 3, -1, -1)
    garments = nn.functional.pad(garments, (2, 2, 2, 2))
    real = garments[torch.arange(0, 500, 17)[:30]].contiguous()
    noise = torch.randint(0, 90, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generated = garments[torch.arange(3, 150, 6)[:24]] // 2 + noise * (torch.arange(24) % 3 == 0)[:, None, None, None]
    return real, generated.to(torch.uint8)


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory) -> tuple[Path, Path]:
    """The generated images, and the real ones."""
    real, generated = images
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "generated", generated), write_images(root / "real", real)


@pytest.fixture(scope="module")
def arrays(images, tmp_path_factory) -> tuple[Path, Path]:
    """The same as ADM's .npz files."""
    root = tmp_path_factory.mktemp("arrays")
    for name, each in zip(("real", "generated"), images):
        np.savez_compressed(root / f"{name}.npz", arr_0=each.permute(0, 2, 3, 1).numpy())
    return root / "generated.npz", root / "real.npz"


@pytest.fixture
def random_dinov2(monkeypatch) -> None:
    """A network with random weights in the place of what PyTorch's hub would fetch."""

    def load(repository: str, name: str) -> nn.Module:
        assert (repository, name) == ("facebookresearch/dinov2", "dinov2_vitl14")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 64, 14, 14), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())

    monkeypatch.setattr(torch.hub, "load", load)


def by_torch_fidelity(generated: Path, real: Path, **options: object) -> dict[str, float]:
    return torch_fidelity.calculate_metrics(
        input1=str(generated), input2=str(real), cuda=False, save_cpu_ram=True, verbose=False, **options
    )


def evaluate(generated: Path, real: Path, report: Path, *options: object) -> dict[str, float]:
    assert run_score("evaluate", generated, "--reference", real, "--json", report, *options) == 0
    return json.loads(report.read_text())


@pytest.mark.parametrize("kind", ["folders", "arrays", "statistics"])
def test_all_scores_equal_torch_fidelity(kind, folders, arrays, random_dinov2, tmp_path, capsys):
    extractor = {"feature_extractor": FEATURE_EXTRACTOR_NAME}
    expected = by_torch_fidelity(
        *folders, isc=True, fid=True, kid=True, prc=True, kid_subset_size=24, kid_subsets=100, **extractor
    )
    dinov2 = by_torch_fidelity(*folders, fid=True, feature_extractor="dinov2-vit-l-14")["frechet_inception_distance"]

    generated, real = arrays if kind == "arrays" else folders
    if kind == "statistics":
        real = tmp_path / "real.npz"
        arguments = ["--output", real, "--keep_features", 30, "--fd_dinov2", *FASHION]
        assert run_score("statistics", folders[1], *arguments) == 0
    found = evaluate(generated, real, tmp_path / "scores.json", *ALL, *FASHION)
    for ours, theirs in [
        ("fid_fashion_classifier", "frechet_inception_distance"),
        ("isc_fashion_classifier_mean", "inception_score_mean"),
        ("precision_fashion_classifier", "precision"),
        ("recall_fashion_classifier", "recall"),
        ("kid_fashion_classifier_mean", "kernel_inception_distance_mean"),
        ("kid_fashion_classifier_std", "kernel_inception_distance_std"),
    ]:
        assert f"{found[ours]:.5g}" == f"{expected[theirs]:.5g}", ours
    assert math.isclose(found["fd_dinov2"], dinov2, rel_tol=1e-4)
    assert expected["precision"] != expected["recall"]  # so that the test would notice if they were exchanged
    printed = capsys.readouterr().out
    for name in ("precision", "recall"):
        assert f"{name:16s} {expected[name]:.4f}" in printed
    assert f"KID              {expected['kernel_inception_distance_mean']:.6f}" in printed
    assert f"FD-DINOv2        {found['fd_dinov2']:.4f}" in printed


def test_inception_scores_equal_torch_fidelity(folders, inception_weights, tmp_path):
    few = [write_images(tmp_path / folder.name, open_images(folder).batches(12).__next__()) for folder in folders]
    options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(inception_weights)}
    expected = by_torch_fidelity(*few, kid=True, prc=True, fid=True, kid_subset_size=12, **options)
    more = ["--precision_recall", "--kid", "--inception_weights", inception_weights]
    found = evaluate(*few, tmp_path / "scores.json", *more)
    for name in expected.keys() - {"f_score"}:
        assert f"{found[name]:.5g}" == f"{expected[name]:.5g}", name


def test_precision_is_of_generated_images_and_recall_of_real_ones():
    """Generated points on one of two clusters of real ones: all are realistic, and half of the real ones are missed."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randn(40, 8, generator=generator)
    real = torch.cat([cluster, cluster + 100])
    generated = cluster + 0.01 * torch.randn(40, 8, generator=generator)
    assert precision_and_recall(generated, real) == (1.0, 0.5)
    assert precision_and_recall(real, generated) == (0.5, 1.0)


def test_blocks_of_images_change_no_distance(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    generated, real = (torch.randn(size, 64, generator=generator) for size in (150, 130))
    whole = precision_and_recall(generated, real * 1.2)
    monkeypatch.setattr(scoring, "DISTANCES_AT_ONCE", 40)
    assert precision_and_recall(generated, real * 1.2, progress=True) == whole
    assert 0 < whole[0] < 1 and whole[0] != whole[1]


def test_the_progress_of_distances_ends_at_the_number_of_pairs(monkeypatch):
    bars = []
    monkeypatch.setattr(scoring, "tqdm", lambda **options: bars.append(mock.Mock(**options)) or bars[-1])
    precision_and_recall(torch.rand(30, 4), torch.rand(20, 4), progress=True)
    assert sum(call.args[0] for call in bars[0].update.call_args_list) == bars[0].total == 2500


# Reference files


def test_a_sample_of_features_is_drawn_alike_every_time(folders, tmp_path):
    for name in ("first.npz", "second.npz"):
        assert run_score("statistics", folders[1], "--output", tmp_path / name, "--keep_features", 9, *FASHION) == 0
    first, second = (Statistics.load(tmp_path / name, 128) for name in ("first.npz", "second.npz"))
    assert first.features is not None and first.features.shape == (9, 128) and first.features.dtype == np.float32
    np.testing.assert_array_equal(first.features, second.features)
    assert run_score("statistics", folders[1], "--output", tmp_path / "without.npz", *FASHION) == 0
    assert Statistics.load(tmp_path / "without.npz", 128).features is None


def test_mean_and_covariance_in_adms_reference_file_are_taken_as_they_are(arrays, tmp_path, capsys):
    with np.load(arrays[1]) as file:
        np.savez(tmp_path / "adm.npz", arr_0=file["arr_0"], mu=np.full(128, 0.5), sigma=np.eye(128), mu_s=0)
    arguments = ["--output", tmp_path / "stats.npz", "--keep_features", 30, *FASHION]
    assert run_score("statistics", tmp_path / "adm.npz", *arguments) == 0
    statistics = Statistics.load(tmp_path / "stats.npz", 128, Metrics(precision_recall=True))
    assert (statistics.mu == 0.5).all() and (statistics.sigma == np.eye(128)).all()
    assert "holds mu and sigma, which are taken as they are" in capsys.readouterr().out


def test_a_statistics_file_can_be_what_is_scored(folders, tmp_path, capsys):
    for folder in folders:
        output = tmp_path / f"{folder.name}.npz"
        assert run_score("statistics", folder, "--output", output, "--keep_features", 24, *FASHION) == 0
    files = [tmp_path / f"{folder.name}.npz" for folder in folders]
    of_files = evaluate(*files, tmp_path / "a.json", "--precision_recall", *FASHION)
    of_folder = evaluate(folders[0], files[1], tmp_path / "b.json", "--precision_recall", *FASHION)
    for name in ("fid_fashion_classifier", "precision_fashion_classifier", "recall_fashion_classifier"):
        assert math.isclose(of_files[name], of_folder[name], rel_tol=1e-6)
    assert of_files["isc_fashion_classifier_mean"] is None
    assert "no Inception Score" in capsys.readouterr().out


# Export


def test_images_are_exported_shuffled_and_whole(images, folders, arrays, tmp_path):
    for source in (folders[0], arrays[0]):
        output = tmp_path / f"{source.name}.out.npz"
        assert score_script.main(["export", str(source), "--output", str(output), "--seed", "3"]) == 0
        with np.load(output) as file:
            assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
            exported = file["arr_0"]
        expected = images[1].permute(0, 2, 3, 1).numpy()
        order = np.random.RandomState(3).permutation(24)
        np.testing.assert_array_equal(exported, expected[order])
        assert not (order == np.arange(24)).all()


def test_a_shuffled_export_has_the_score_in_consecutive_parts_that_a_sorted_one_loses(tmp_path):
    """Images sorted by class: each of ADM's consecutive parts knows a few classes alone."""
    shades = np.repeat(np.arange(20, dtype=np.uint8) * 12, 20)
    folder = write_images(tmp_path / "sorted", torch.from_numpy(shades)[:, None, None, None].expand(-1, 3, 8, 8))
    export(open_images(folder), tmp_path / "out.npz", seed=0)
    with np.load(tmp_path / "out.npz") as file:
        exported = file["arr_0"][:, 0, 0, 0]
    classes = [[len(set(part)) for part in np.split(each, 10)] for each in (shades, exported)]
    assert max(classes[0]) == 2 and min(classes[1]) > 12


def test_the_folder_of_a_run_is_exported_if_all_its_images_are_there(images, tmp_path, capsys):
    write_images(tmp_path / "images", images[1])
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"num_images": 24}}))
    (tmp_path / "grid.png").write_bytes(b"no image of the run")
    assert score_script.main(["export", str(tmp_path), "--output", str(tmp_path / "out.npz")]) == 0
    (tmp_path / "images" / "003.png").unlink()
    assert score_script.main(["export", str(tmp_path), "--output", str(tmp_path / "out.npz")]) == 2
    assert "holds 23 of the run's 24 images" in capsys.readouterr().err


# Standard errors


def test_standard_errors_are_those_of_the_mean_where_that_is_known():
    """Precision against a fixed reference is a mean over images, whose jackknife is the standard error over groups."""
    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(200, 4, generator=generator) * 1.5, torch.randn(100, 4, generator=generator)
    logits, metrics = torch.randn(200, 10, generator=generator), Metrics(precision_recall=True, standard_errors=True)
    reference = Statistics.from_features(real, keep=None)
    whole = score(features, logits, reference, metrics)
    labels = [index % 5 for index in range(200)]
    scores = with_standard_errors(whole, features, logits, reference, metrics, None, labels)
    groups = groups_of_images(labels)
    means = [score(features[groups == group], logits[:20], reference, metrics).precision for group in range(10)]
    assert math.isclose(scores.errors["precision"], np.std(means, ddof=1) / math.sqrt(10), rel_tol=1e-5)
    assert scores.errors.keys() == {"fid", "is_mean", "precision", "recall"}
    assert all(0 < error < 1 for error in scores.errors.values())
    named = scores.metrics("inception")
    assert named["standard_errors"]["precision"] == scores.errors["precision"]
    assert "standard errors" in scores.table("inception")
    assert Scores.of_metrics(json.loads(json.dumps(named)))[1].recall == whole.recall


@pytest.mark.parametrize("num_classes", [1, 7, 10, 100, 1000])
def test_standard_errors_are_over_ten_groups_however_few_images_a_class_has(num_classes):
    labels = np.arange(300) % num_classes
    groups = groups_of_images(labels.tolist())
    assert np.bincount(groups).tolist() == [30] * 10
    counts = np.array([np.bincount(labels[groups == group], minlength=num_classes) for group in range(10)])
    assert (np.ptp(counts, axis=0) <= 1).all()


def test_images_of_unknown_classes_are_grouped_at_random():
    """Images of a run are of class i mod 10: groups by number would be classes, and their errors far too large."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 4, generator=generator) + 5 * (torch.arange(400) % 10)[:, None]
    reference = Statistics.from_features(torch.randn(400, 4, generator=generator) + 22, keep=None)
    metrics, logits = Metrics(standard_errors=True), torch.randn(400, 10, generator=generator)
    unknown = score(features, logits, reference, metrics)
    known = score(features, logits, reference, metrics, labels=[index % 10 for index in range(400)])
    by_number = score(features, logits, reference, metrics, labels=[0] * 400)
    assert unknown.fid == known.fid
    assert known.errors["fid"] < unknown.errors["fid"] < 0.5 * by_number.errors["fid"]


# Bad input


@pytest.fixture
def bad(images, folders, tmp_path) -> Path:
    """A folder of all kinds of files that cannot be used."""
    write_images(tmp_path / "three", images[0][:3])
    write_images(tmp_path / "one", images[0][:1])
    write_images(tmp_path / "larger", nn.functional.interpolate(images[0], scale_factor=2))
    np.savez(tmp_path / "numbers.npz", values=np.zeros(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 32, 32, 3), np.float32))
    np.savez(tmp_path / "grey.npz", arr_0=np.zeros((4, 32, 32), np.uint8))
    (tmp_path / "text.npz").write_text("no archive")
    Statistics(np.zeros(128), np.eye(128)).save(tmp_path / "plain.npz")
    Statistics(np.zeros(2048), np.eye(2048)).save(tmp_path / "inception.npz")
    Statistics(np.zeros(128), np.eye(128), np.zeros((3, 128), np.float32)).save(tmp_path / "few.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(128), sigma=np.eye(128), features=np.zeros((9, 64)))
    np.savez(tmp_path / "small.npz", mu=np.zeros(128), sigma=np.eye(128), dinov2_mu=np.zeros(3), dinov2_sigma=np.eye(3))
    np.savez(tmp_path / "cut.npz", arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:9000])
    return tmp_path


@pytest.mark.parametrize(
    ("images_of", "reference", "flags", "message"),
    [
        ("three", None, ["--precision_recall"], "three holds 3: add images"),
        (None, "three", ["--precision_recall"], "--precision_recall takes at least 4 images"),
        (None, "few.npz", ["--precision_recall"], "few.npz holds features of 3: make a file"),
        (None, "plain.npz", ["--precision_recall"], "--keep_features 10000"),
        (None, "plain.npz", ["--kid"], "--kid needs features of the reference images, and"),
        (None, "plain.npz", ["--fd_dinov2"], "plain.npz holds none: make a file that does with"),
        ("plain.npz", None, ["--precision_recall"], "plain.npz holds mean and covariance alone"),
        ("plain.npz", None, ["--standard_errors"], "--standard_errors needs images, and"),
        (None, "inception.npz", [], "mu [2048] and sigma [2048, 2048], but the features have 128 dimensions"),
        (None, "other.npz", ["--kid"], "other.npz has features [9, 64], but those of the images have 128 dimensions"),
        (None, "small.npz", ["--fd_dinov2"], "dinov2_mu [3] and dinov2_sigma [3, 3]"),
        (None, "one", [], "a reference takes at least 2 images, and"),
        (None, "larger", [], "32 x 32 pixels, but those of"),
        (None, "numbers.npz", [], "numbers.npz holds neither images (arr_0) nor statistics (mu and sigma), but values"),
        ("floats.npz", None, [], "floats.npz holds arr_0 of float32 [4, 32, 32, 3], which are no images"),
        ("grey.npz", None, [], "grey.npz holds arr_0 of uint8 [4, 32, 32], which are no images"),
        (None, "text.npz", [], "text.npz cannot be read as an .npz file"),
        ("cut.npz", None, [], "cut.npz cannot be read as an .npz file"),
        ("nowhere.npz", None, [], "nowhere.npz does not exist"),
        ("nowhere", None, [], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    images_of, reference, flags, message, bad, folders, capsys, monkeypatch
):
    monkeypatch.setattr(score_script, "load_extractor", mock.Mock(side_effect=AssertionError("work has begun")))
    generated, real = bad / images_of if images_of else folders[0], bad / reference if reference else folders[1]
    assert run_score("evaluate", generated, "--reference", real, *flags, *FASHION) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0 and error.startswith("error: ")


def test_bad_input_to_statistics_and_export_is_refused(bad, folders, capsys):
    for arguments, message in [
        (["statistics", folders[1], "--keep_features", 31], "at least 31 images, and there are 30 in"),
        (["statistics", bad / "plain.npz"], "plain.npz holds no images, but mu, sigma"),
        (["export", bad / "plain.npz"], "plain.npz holds no images, but mu, sigma"),
    ]:
        assert score_script.main([*map(str, arguments), "--output", str(bad / "out.npz")]) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_image_in_an_array_is_refused(arrays, tmp_path):
    content = bytearray(arrays[0].read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged\.npz is damaged"):
        list(open_images(tmp_path / "damaged.npz").batches(5))


def test_without_network_dinov2_names_the_folder_and_the_command(monkeypatch):
    monkeypatch.setattr(torch.hub, "load", mock.Mock(side_effect=OSError("Network is unreachable")))
    with pytest.raises(InputError) as caught:
        scoring.load_extractor("fashion", with_dinov2=True)
    for part in ("--fd_dinov2", torch.hub.get_dir(), "torch.hub.load('facebookresearch/dinov2', 'dinov2_vitl14')"):
        assert part in str(caught.value)


def test_an_image_of_another_size_is_found_before_any_is_scored(images, tmp_path):
    folder = write_images(tmp_path / "mixed", images[0][:9])
    Image.new("RGB", (40, 30)).save(folder / "008.png")
    with pytest.raises(InputError, match=r"008\.png is 40 x 30 pixels"):
        open_images(folder)
