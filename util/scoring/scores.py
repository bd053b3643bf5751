"""FID and Inception Score, computed by stock torch-fidelity.

torch-fidelity by itself compares two folders of images. Here its parts are used one by one: an extractor computes the
features of a batch, so that images are scored as they are made, and the images to compare with are given by the mean
and covariance of their features in a `.npz` file, `mu` and `sigma`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, FeatureExtractorInceptionV3
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from util.errors import InputError, why_unreadable
from util.files import atomic_write
from util.scoring.classifier import FEATURE_EXTRACTOR_NAME, FEATURES_DIM, FashionFeatureExtractor
from util.weights.download import RemoteFile, download

INCEPTION_SPLITS = DEFAULTS["isc_splits"]  # the Inception Score is the mean over this many parts of the images
INCEPTION_FILE = URL_INCEPTION_V3.rpartition("/")[2]
FEATURES_DIMS = {"inception": 2048, "fashion": FEATURES_DIM}  # features per image, by the extractor's name


class Extractor:
    """Maps uint8 images [B, 3, H, W] to features [B, F] and logits [B, K], float32, both on the extractor's device.

    Attributes:
        name:         "inception" or "fashion".
        features_dim: F, 2048 or 128. K is 1008 or 10.
        device:       where the network is; images may be anywhere.
    """

    def __init__(self, name: str, network: torch.nn.Module, device: torch.device | str) -> None:
        self.name = name
        self.features_dim = FEATURES_DIMS[name]
        self.device = torch.device(device)
        self.network = network.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(images.to(self.device))


def load_extractor(name: str, weights_path: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Load the network whose features images are scored by.

    Args:
        name:         "inception": torch-fidelity's "inception-v3-compat", the standard for FID and IS.
                      "fashion":   the Fashion-MNIST classifier, for 32 x 32 images; see `util.scoring.classifier`.
        weights_path: its weights. Default: the shipped classifier; for Inception, torch-fidelity's file in PyTorch's
                      hub folder, downloaded (95 MB) if it is not there. Let one process load it first.

    Raises:
        InputError: the weights are missing and cannot be downloaded, are damaged, hold code, or do not fit.
    """
    if name == "fashion":
        network = FashionFeatureExtractor(
            FEATURE_EXTRACTOR_NAME, ["features", "logits"], feature_extractor_weights_path=weights_path
        )
    else:
        network = _load_inception(Path(weights_path) if weights_path else _downloaded_inception())
    return Extractor(name, network, device)


def _downloaded_inception() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE  # where torch-fidelity itself looks for it
    try:
        download(RemoteFile(URL_INCEPTION_V3, str(path), 95e6), path)
    except InputError as error:
        raise InputError(
            f"Inception's weights are not at {path} and could not be downloaded ({error}): get {INCEPTION_FILE} from "
            f"torch-fidelity's public release, {URL_INCEPTION_V3}, and name it with --inception_weights."
        ) from None
    return path


def _load_inception(path: Path) -> FeatureExtractorInceptionV3:
    way_out = f"get {INCEPTION_FILE} again from {URL_INCEPTION_V3} and name it with --inception_weights."
    if not path.is_file():
        raise InputError(f"Inception's weights, {path}, do not exist: {way_out}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails with whatever the line of the reader that meets it raises
        raise InputError(f"{path} is damaged, or could run code ({why_unreadable(error)}): {way_out}") from None
    # torch-fidelity unpickles what it is given without a check, so it is given our own copy of the checked tensors.
    checked = io.BytesIO()
    torch.save(weights, checked)
    checked.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
        )
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path} does not hold the weights of torch-fidelity's Inception: {way_out}") from None


@dataclass(frozen=True)
class Statistics:
    """Mean [F] and covariance [F, F] of the features of a set of images, float64: all that FID asks of a set."""

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def from_features(cls, features: torch.Tensor) -> Statistics:
        """Compute them from features [N, F]. Raises InputError unless N is at least 2 and all features are finite."""
        _check_finite(features)
        if len(features) < 2:
            raise InputError(f"statistics take at least 2 images, and there are {len(features)}: add images.")
        return cls(**fid_features_to_statistics(features.cpu().double()))

    @classmethod
    def load(cls, path: str | Path, features_dim: int) -> Statistics:
        """Read `mu` [features_dim] and `sigma` [features_dim, features_dim] from a `.npz` file.

        Raises:
            InputError: the file is missing or damaged, lacks one of them, or they have other shapes or are not finite.
        """
        way_out = "name another file, or make one with `python score.py statistics FOLDER --output FILE`."
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        except FileNotFoundError:
            raise InputError(f"the statistics file {path} does not exist: {way_out}") from None
        except KeyError:
            raise InputError(f"the statistics file {path} holds no mu and sigma: {way_out}") from None
        except Exception as error:  # a damaged archive fails in zipfile, zlib or NumPy's header parser
            raise InputError(
                f"the statistics file {path} cannot be read ({why_unreadable(error)}): {way_out}"
            ) from None
        if mu.shape != (features_dim,) or sigma.shape != (features_dim, features_dim):
            raise InputError(
                f"the statistics file {path} has mu {list(mu.shape)} and sigma {list(sigma.shape)}, but the features "
                f"have {features_dim} dimensions: {way_out}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"the statistics file {path} holds numbers that are not finite: {way_out}")
        return cls(mu, sigma)

    def save(self, path: str | Path) -> None:
        """Write a `.npz` file, whole or not at all. Raises InputError if it cannot be written."""
        try:
            with atomic_write(path) as partial, partial.open("wb") as file:
                np.savez(file, mu=self.mu, sigma=self.sigma)
        except OSError as error:
            raise InputError(f"cannot write the statistics file {path}: {error}.") from None


@dataclass(frozen=True)
class Scores:
    """FID against a reference, and Inception Score; None where there are too few images, as `notes` then say."""

    fid: float | None
    is_mean: float | None
    is_std: float | None
    notes: tuple[str, ...] = ()

    def metrics(self, extractor: str) -> dict[str, float | None]:
        """The scores by name. Names tell those of one `extractor` ("inception", "fashion") from those of the other."""
        if extractor == "inception":
            names = KEY_METRIC_FID, KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
        else:
            names = "fid_fashion_classifier", "isc_fashion_classifier_mean", "isc_fashion_classifier_std"
        return dict(zip(names, (self.fid, self.is_mean, self.is_std)))

    def table(self, extractor: str) -> str:
        """The scores for a person to read, a line each, then the notes."""
        network = "Inception" if extractor == "inception" else "Fashion-MNIST classifier, not Inception"
        deviation = "" if self.is_std is None else f" ± {self.is_std:.4f}"
        lines = [f"FID              {_number(self.fid)}", f"Inception Score  {_number(self.is_mean)}{deviation}"]
        return "\n".join([f"features: {network}", *lines, *(f"note: {note}" for note in self.notes)])


def score(features: torch.Tensor, logits: torch.Tensor, reference: Statistics) -> Scores:
    """FID and IS as `torch_fidelity.calculate_metrics` has them, in float64.

    Args:
        features:  [N, F] of all images.
        logits:    [N, K], in the order of the images' names, on which the parts of the Inception Score depend.
        reference: statistics of the images to compare with.

    Raises:
        InputError: a feature or logit is not finite.
    """
    _check_finite(features)
    _check_finite(logits)
    num_images, features_dim = features.shape
    fid = is_mean = is_std = None
    notes = []
    if num_images < 2:
        notes.append("FID takes at least 2 images.")
    else:
        own = Statistics.from_features(features)
        fid = fid_statistics_to_metric(vars(own), vars(reference), verbose=False)[KEY_METRIC_FID]
        if num_images <= features_dim:
            notes.append(
                f"{num_images} images do not determine a covariance of {features_dim} features: this FID is far too "
                "high, and good for no comparison but with as many images."
            )
    if num_images < INCEPTION_SPLITS:
        notes.append(f"The Inception Score takes at least {INCEPTION_SPLITS} images.")
    else:
        inception_score = isc_features_to_metric(
            logits.cpu().double(),
            splits=INCEPTION_SPLITS,
            shuffle=DEFAULTS["samples_shuffle"],
            rng_seed=DEFAULTS["rng_seed"],
        )
        is_mean, is_std = inception_score[KEY_METRIC_ISC_MEAN], inception_score[KEY_METRIC_ISC_STD]
    return Scores(fid, is_mean, is_std, tuple(notes))


def _check_finite(values: torch.Tensor) -> None:
    """Raise InputError, naming the first image, unless all `values` [N, F] are finite."""
    broken = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(f"the features of {len(broken)} images are not finite, first of number {broken[0]}.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
