"""FID, Inception Score, precision and recall, KID and FD-DINOv2, computed by stock torch-fidelity.

torch-fidelity by itself compares two folders of images. Here its parts are used one by one: an extractor computes the
features of a batch, so that images are scored as they are made. The images to compare with are given by a `.npz` file:
the mean and covariance of their features, and a sample of the features themselves for precision, recall and KID.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch_fidelity import (
    KEY_METRIC_FID,
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA, FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from util.cli import flag
from util.errors import InputError, why_unreadable
from util.files import atomic_write
from util.scoring.classifier import FEATURE_EXTRACTOR_NAME, FEATURES_DIM, FashionFeatureExtractor
from util.scoring.jackknife import GROUPS, groups_of_images, jackknife, random_groups
from util.weights.download import RemoteFile, download

INCEPTION_SPLITS = DEFAULTS["isc_splits"]  # the Inception Score is the mean over this many parts of the images
INCEPTION_FILE = URL_INCEPTION_V3.rpartition("/")[2]
FEATURES_DIMS = {"inception": 2048, "fashion": FEATURES_DIM}  # features per image, by the extractor's name
DINOV2 = "dinov2-vit-l-14"  # the network behind FD-DINOv2, by torch-fidelity's name
DINOV2_DIM = 1024
NEIGHBOURS = DEFAULTS["prc_neighborhood"]  # a ball around an image reaches to its third nearest neighbour
DISTANCES_AT_ONCE = 1000  # images whose distances to all others are in memory, for precision and recall
SUBSET_SIZE = DEFAULTS["kid_subset_size"]  # images in each of the subsets that KID is averaged over
ADM_REFERENCE = "ADM's 10,000 reference images (VIRTUAL_imagenet256_labeled.npz of openai/guided-diffusion)"


@dataclass(frozen=True)
class Metrics:
    """What is computed besides FID and Inception Score; each is a flag."""

    precision_recall: bool = flag(
        False,
        "compute precision and recall, too, by 3 nearest neighbours; needs features of the reference",
    )
    kid: bool = flag(False, "compute the Kernel Inception Distance, too; needs features of the reference")
    fd_dinov2: bool = flag(
        False,
        "compute the Frechet distance on features of DINOv2 (ViT-L/14), too; PyTorch's hub fetches the network from "
        "GitHub's facebookresearch/dinov2, code included",
    )
    standard_errors: bool = flag(
        False, "estimate each score's standard error, too, over ten groups of images; takes eleven times as long"
    )

    @property
    def flags(self) -> list[str]:
        """The flags that were given."""
        return [f"--{each.name}" for each in fields(self) if getattr(self, each.name)]

    @property
    def need_features(self) -> bool:
        return self.precision_recall or self.kid


FID_AND_IS = Metrics()


class Extractor:
    """Maps uint8 images [B, 3, H, W] to features [B, F] and logits [B, K], and with DINOv2 to its features [B, 1024].

    All are float32 and on the extractor's device.

    Attributes:
        name:         "inception" or "fashion".
        features_dim: F, 2048 or 128. K is 1008 or 10.
        device:       where the networks are; images may be anywhere.
        dinov2:       the second network; None if FD-DINOv2 is not wanted.
    """

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        device: torch.device | str,
        dinov2: torch.nn.Module | None = None,
    ) -> None:
        self.name = name
        self.features_dim = FEATURES_DIMS[name]
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.dinov2 = None if dinov2 is None else dinov2.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = images.to(self.device)
        return (*self.network(images), *(self.dinov2(images) if self.dinov2 is not None else ()))


def load_extractor(
    name: str,
    weights_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    with_dinov2: bool = False,
) -> Extractor:
    """Load the network whose features images are scored by.

    Args:
        name:         "inception": torch-fidelity's "inception-v3-compat", the standard for FID and IS.
                      "fashion":   the Fashion-MNIST classifier, for 32 x 32 images; see `util.scoring.classifier`.
        weights_path: its weights. Default: the shipped classifier; for Inception, torch-fidelity's file in PyTorch's
                      hub folder, downloaded (95 MB) if it is not there. Let one process load it first.
        with_dinov2:  load torch-fidelity's DINOv2, too, from PyTorch's hub folder; it is fetched if it is not there.

    Raises:
        InputError: weights are missing and cannot be downloaded, are damaged, hold code, or do not fit.
    """
    if name == "fashion":
        network = FashionFeatureExtractor(
            FEATURE_EXTRACTOR_NAME, ["features", "logits"], feature_extractor_weights_path=weights_path
        )
    else:
        network = _load_inception(Path(weights_path) if weights_path else _downloaded_inception())
    return Extractor(name, network, device, _load_dinov2() if with_dinov2 else None)


def _load_dinov2() -> FeatureExtractorDinoV2:
    try:
        return FeatureExtractorDinoV2(DINOV2, ["dinov2"])
    except Exception as error:  # PyTorch's hub runs code that it has fetched, which can fail in any way
        name = MODEL_METADATA[DINOV2]
        raise InputError(
            f"--fd_dinov2 needs {name} of GitHub's facebookresearch/dinov2 in PyTorch's hub folder, "
            f"{torch.hub.get_dir()}, and it could not be loaded ({why_unreadable(error)}): run torch.hub.load("
            f"'facebookresearch/dinov2', '{name}') where there is a network and copy the folder, or leave the flag out."
        ) from None


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
    """Mean [F] and covariance [F, F] of the features of a set of images, float64: all that FID asks of a set.

    features: [M, F] float32 of all of the set's images or of a sample, for precision, recall and KID; None without.
    dinov2:   mean and covariance of DINOv2's features of the same images; None without.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None
    dinov2: Statistics | None = None

    @classmethod
    def from_features(
        cls, features: torch.Tensor, dinov2: torch.Tensor | None = None, *, keep: int | None = 0
    ) -> Statistics:
        """Compute them from features [N, F] and, if given, DINOv2's [N, 1024].

        `keep` is the number of images whose features are kept, drawn with a fixed seed; None keeps all.

        Raises InputError unless N is at least 2 and at least `keep`, and all features are finite.
        """
        _check_finite(features)
        if len(features) < max(2, keep or 0):
            raise InputError(
                f"statistics take at least {max(2, keep or 0)} images, and there are {len(features)}: add images."
            )
        statistics = cls(**fid_features_to_statistics(features.cpu().double()))
        if keep != 0:
            statistics = statistics.with_features(features, keep)
        return statistics if dinov2 is None else replace(statistics, dinov2=cls.from_features(dinov2))

    def with_features(self, features: torch.Tensor, keep: int | None = None) -> Statistics:
        """These statistics with `keep` of the features [N, F], drawn with a fixed seed and in their order, or all."""
        if keep is not None and keep < len(features):
            features = features[np.sort(np.random.RandomState(0).choice(len(features), keep, replace=False))]
        return replace(self, features=features.cpu().numpy())

    @classmethod
    def load(cls, path: str | Path, features_dim: int, metrics: Metrics = FID_AND_IS) -> Statistics:
        """Read `mu` [features_dim] and `sigma` [features_dim, features_dim] from a `.npz` file, and what else is there.

        That may be `features` [M, features_dim], `dinov2_mu` [1024] and `dinov2_sigma` [1024, 1024].

        Raises:
            InputError: the file is missing or damaged, lacks mu or sigma or what one of the `metrics` needs, or holds
                other shapes or numbers that are not finite.
        """
        way_out = "name another file, or make one with `python score.py statistics FOLDER --output FILE`."
        optional = ("features", "dinov2_mu", "dinov2_sigma")
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
                features, *dinov2 = (file.get(name) for name in optional)
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
        if features is not None and (features.ndim != 2 or features.shape[1] != features_dim):
            raise InputError(
                f"the statistics file {path} has features {list(features.shape)}, but those of the images have "
                f"{features_dim} dimensions: {way_out}"
            )
        if any(part is not None for part in dinov2):
            shapes = [[] if part is None else list(part.shape) for part in dinov2]
            if shapes != [[DINOV2_DIM], [DINOV2_DIM, DINOV2_DIM]]:
                raise InputError(
                    f"the statistics file {path} has dinov2_mu {shapes[0]} and dinov2_sigma {shapes[1]}, but the "
                    f"features of DINOv2 have {DINOV2_DIM} dimensions: {way_out}"
                )
        found = [part for part in (mu, sigma, features, *dinov2) if part is not None]
        if not all(np.isfinite(part).all() for part in found):
            raise InputError(f"the statistics file {path} holds numbers that are not finite: {way_out}")
        of_dinov2 = None if dinov2[0] is None else cls(*(part.astype(np.float64) for part in dinov2))
        statistics = cls(mu, sigma, None if features is None else features.astype(np.float32), of_dinov2)
        statistics.check_serves(metrics, path)
        return statistics

    def check_serves(self, metrics: Metrics, path: str | Path) -> None:
        """Raise InputError, naming the flag and the way out, unless these statistics of a file serve the `metrics`."""
        if metrics.need_features:
            name = "--precision_recall" if metrics.precision_recall else "--kid"
            way_out = f"make a file that holds them from {ADM_REFERENCE}, or from images of your own, with "
            way_out += "`python score.py statistics FOLDER_OR_NPZ --keep_features 10000 --output FILE`."
            if self.features is None:
                raise InputError(
                    f"{name} needs features of the reference images, and {path} holds mean and covariance alone: "
                    f"{way_out}"
                )
            check_count(
                replace(metrics, standard_errors=False), len(self.features), f"{path} holds features of", way_out
            )
        if metrics.fd_dinov2 and self.dinov2 is None:
            raise InputError(
                f"--fd_dinov2 needs DINOv2's mean and covariance of the reference images, and {path} holds none: make "
                "a file that does with `python score.py statistics FOLDER_OR_NPZ --fd_dinov2 --output FILE`."
            )

    def save(self, path: str | Path) -> None:
        """Write a `.npz` file, whole or not at all. Raises InputError if it cannot be written."""
        arrays: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma}
        if self.features is not None:
            arrays["features"] = self.features
        if self.dinov2 is not None:
            arrays.update(dinov2_mu=self.dinov2.mu, dinov2_sigma=self.dinov2.sigma)
        try:
            with atomic_write(path) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise InputError(f"cannot write the statistics file {path}: {error}.") from None


def check_count(metrics: Metrics, num_images: int, whose: str, way_out: str = "add images.") -> None:
    """Raise InputError if there are too few images for one of the `metrics`; `whose` begins the sentence on them."""
    least = {"--precision_recall": NEIGHBOURS + 1, "--kid": 2, "--fd_dinov2": 2, "--standard_errors": GROUPS}
    for name in metrics.flags:
        if num_images < least[name]:
            reason = f", as it looks for the {NEIGHBOURS} nearest neighbours" if name == "--precision_recall" else ""
            raise InputError(f"{name} takes at least {least[name]} images{reason}; {whose} {num_images}: {way_out}")


def _frechet_distance(own: Statistics, reference: Statistics) -> float:
    first, second = ({"mu": each.mu, "sigma": each.sigma} for each in (own, reference))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


# Names of the scores in metrics.json, by the extractor's name and by the field of `Scores`.
KEYS = {
    "inception": {
        "fid": KEY_METRIC_FID,
        "is_mean": KEY_METRIC_ISC_MEAN,
        "is_std": KEY_METRIC_ISC_STD,
        "precision": KEY_METRIC_PRECISION,
        "recall": KEY_METRIC_RECALL,
        "kid_mean": KEY_METRIC_KID_MEAN,
        "kid_std": KEY_METRIC_KID_STD,
        "fd_dinov2": "fd_dinov2",
    },
    "fashion": {
        "fid": "fid_fashion_classifier",
        "is_mean": "isc_fashion_classifier_mean",
        "is_std": "isc_fashion_classifier_std",
        "precision": "precision_fashion_classifier",
        "recall": "recall_fashion_classifier",
        "kid_mean": "kid_fashion_classifier_mean",
        "kid_std": "kid_fashion_classifier_std",
        "fd_dinov2": "fd_dinov2",
    },
}


@dataclass(frozen=True)
class Scores:
    """FID against a reference, and Inception Score; None where there are too few images, as `notes` then say.

    The others are None unless they were asked for.
    """

    fid: float | None
    is_mean: float | None
    is_std: float | None
    notes: tuple[str, ...] = ()
    precision: float | None = None
    recall: float | None = None
    kid_mean: float | None = None
    kid_std: float | None = None
    fd_dinov2: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)  # standard errors, by field

    def metrics(self, extractor: str) -> dict[str, Any]:
        """The scores by name. Names tell those of one `extractor` ("inception", "fashion") from those of the other."""
        values = {name: getattr(self, name) for name in KEYS[extractor]}
        always = ("fid", "is_mean", "is_std")
        keys = KEYS[extractor]
        named = {keys[name]: value for name, value in values.items() if name in always or value is not None}
        errors = {keys[name]: error for name, error in self.errors.items()}
        return {**named, **({"standard_errors": errors} if errors else {})}

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, Any]) -> tuple[str | None, Scores]:
        """The scores that `metrics.json` holds, and the name of the extractor that they come from; None without."""
        for extractor, keys in KEYS.items():
            if keys["fid"] in metrics:
                values: dict[str, Any] = {name: metrics.get(key) for name, key in keys.items()}
                return extractor, cls(**values, notes=tuple(metrics.get("notes", ())))
        return None, cls(None, None, None)

    def table(self, extractor: str) -> str:
        """The scores for a person to read, a line each, then the notes."""
        network = "Inception" if extractor == "inception" else "Fashion-MNIST classifier, not Inception"
        deviation = "" if self.is_std is None else f" ± {self.is_std:.4f}"
        lines = [f"FID              {_number(self.fid)}", f"Inception Score  {_number(self.is_mean)}{deviation}"]
        if self.precision is not None:
            lines += [f"precision        {_number(self.precision)}", f"recall           {_number(self.recall)}"]
        if self.kid_mean is not None:
            lines.append(f"KID              {self.kid_mean:.6f} ± {self.kid_std:.6f}")
        if self.fd_dinov2 is not None:
            lines.append(f"FD-DINOv2        {_number(self.fd_dinov2)}")
        if self.errors:
            errors = ", ".join(f"{KEYS[extractor][name]} {error:.4g}" for name, error in self.errors.items())
            lines.append(f"standard errors  {errors}")
        return "\n".join([f"features: {network}", *lines, *(f"note: {note}" for note in self.notes)])


def score(
    features: torch.Tensor,
    logits: torch.Tensor,
    reference: Statistics,
    metrics: Metrics = FID_AND_IS,
    dinov2: torch.Tensor | None = None,
    *,
    labels: Sequence[int] | None = None,
    progress: bool = False,
) -> Scores:
    """Scores as `torch_fidelity.calculate_metrics` has them.

    Args:
        features:  [N, F] of all images.
        logits:    [N, K], in the order of the images' names, on which the parts of the Inception Score depend.
        reference: statistics of the images to compare with, which must serve the `metrics`.
        metrics:   what else is computed; by default nothing.
        dinov2:    [N, 1024] DINOv2's features, if the `metrics` ask for FD-DINOv2.
        labels:    the images' classes, for standard errors; None if they are not known.
        progress:  show the progress of precision and recall.

    Raises:
        InputError: a feature or logit is not finite, or there are too few images for one of the `metrics`.
    """
    _check_finite(features)
    num_images, features_dim = features.shape
    check_count(metrics, num_images, "there are")
    notes = []
    own = None
    if num_images < 2:
        notes.append("FID takes at least 2 images.")
    else:
        own = Statistics.from_features(features, dinov2, keep=None)
        if num_images <= features_dim:
            notes.append(
                f"{num_images} images do not determine a covariance of {features_dim} features: this FID is far too "
                "high, and good for no comparison but with as many images."
            )
    scores = score_statistics(own, reference, metrics, logits=logits, notes=notes, progress=progress)
    if metrics.standard_errors:
        return with_standard_errors(scores, features, logits, reference, metrics, dinov2, labels)
    return scores


def with_standard_errors(
    scores: Scores,
    features: torch.Tensor,
    logits: torch.Tensor,
    reference: Statistics,
    metrics: Metrics,
    dinov2: torch.Tensor | None,
    labels: Sequence[int] | None,
) -> Scores:
    """Add standard errors to scores of images: the jackknife over ten groups.

    Args:
        scores: of all images, as `score` makes them of the arguments that follow.
        labels: the images' classes, which are spread evenly over the groups; None has the groups drawn at random.
    """
    of_parts = replace(metrics, standard_errors=False)
    names = [name for name in KEYS["inception"] if getattr(scores, name) is not None and not name.endswith("_std")]

    with tqdm(total=GROUPS, unit="scoring", desc="standard errors") as bar:

        def measure(chosen: np.ndarray) -> list[float]:
            if chosen.all():
                return [getattr(scores, name) for name in names]
            mask = torch.from_numpy(chosen)
            part = score(features[mask], logits[mask], reference, of_parts, None if dinov2 is None else dinov2[mask])
            bar.update()
            return [getattr(part, name) for name in names]

        groups = random_groups(len(features)) if labels is None else groups_of_images(labels)
        measured = jackknife(measure, groups)
    return replace(scores, errors={name: spread.error for name, spread in zip(names, measured)})


def score_statistics(
    own: Statistics | None,
    reference: Statistics,
    metrics: Metrics,
    *,
    logits: torch.Tensor | None = None,
    notes: list[str] | None = None,
    progress: bool = False,
) -> Scores:
    """Scores of images that are given by statistics, `own`; those of a single image are None, as it has no covariance.

    Without `logits` there is no Inception Score. Both `own` and `reference` must serve the `metrics`.
    """
    notes = list(notes or ())
    scores: dict[str, Any] = {"fid": None, "is_mean": None, "is_std": None}
    if own is not None:
        scores["fid"] = _frechet_distance(own, reference)
    if logits is None:
        notes.append("A statistics file holds no logits, so that there is no Inception Score.")
    elif len(logits) < INCEPTION_SPLITS:
        notes.append(f"The Inception Score takes at least {INCEPTION_SPLITS} images.")
    else:
        _check_finite(logits)
        inception_score = isc_features_to_metric(
            logits.cpu().double(),
            splits=INCEPTION_SPLITS,
            shuffle=DEFAULTS["samples_shuffle"],
            rng_seed=DEFAULTS["rng_seed"],
        )
        scores.update(is_mean=inception_score[KEY_METRIC_ISC_MEAN], is_std=inception_score[KEY_METRIC_ISC_STD])
    if own is not None and own.features is not None and reference.features is not None:
        generated, real = torch.from_numpy(own.features), torch.from_numpy(reference.features)
        if metrics.precision_recall:
            scores["precision"], scores["recall"] = precision_and_recall(generated, real, progress=progress)
        if metrics.kid:
            size = min(SUBSET_SIZE, len(generated), len(real))
            kid = kid_features_to_metric(generated, real, kid_subset_size=size, verbose=False)
            scores.update(kid_mean=kid[KEY_METRIC_KID_MEAN], kid_std=kid[KEY_METRIC_KID_STD])
            if size < SUBSET_SIZE:
                notes.append(f"KID is of subsets of {size} images, where {SUBSET_SIZE} are usual.")
    if metrics.fd_dinov2 and own is not None and own.dinov2 is not None and reference.dinov2 is not None:
        scores["fd_dinov2"] = _frechet_distance(own.dinov2, reference.dinov2)
    return Scores(**scores, notes=tuple(notes))


def precision_and_recall(generated: torch.Tensor, real: torch.Tensor, *, progress: bool = False) -> tuple[float, float]:
    """Precision and recall of features [N, F] against real images' [M, F], by torch-fidelity.

    Precision is the share of generated images in a ball around a real one, recall that of real images in a ball around
    a generated one. The distances of `DISTANCES_AT_ONCE` images to all others are in memory at a time.
    """
    count = len(generated) + len(real)
    with _DistanceProgress(count**2, enabled=progress):
        values = prc_features_to_metric(
            generated, real, prc_batch_size=DISTANCES_AT_ONCE, save_cpu_ram=True, verbose=False
        )
    return values[KEY_METRIC_PRECISION], values[KEY_METRIC_RECALL]


class _DistanceProgress(TorchFunctionMode):
    """A progress bar of pairs of images whose distance is known, which watches the calls of `torch.cdist`."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self.bar = tqdm(total=total, disable=not enabled, desc="precision and recall", unit="pair", unit_scale=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.cdist:
            self.bar.update(len(args[0]) * len(args[1]))
        return result

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()
        super().__exit__(*exception)


def _check_finite(values: torch.Tensor) -> None:
    """Raise InputError, naming the first image, unless all `values` [N, F] are finite."""
    broken = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(f"the features of {len(broken)} images are not finite, first of number {broken[0]}.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
