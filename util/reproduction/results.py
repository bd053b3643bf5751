"""The results of `reproduce.py`, which `report.py` reads: what each of them holds, and the file that it is kept in.

    results/mar_tiny-lazymar.json           a `Row` of the table
    results/ablation-caches-token.json      a `Comparison` of one policy with the baseline
    results/frontier-lazymar+disa.json      a `FrontierPoint`: the quality and the costs of a method
    results/mar_tiny-redundancy.json        the `Redundancy` between a model's steps

A file is whole, or known to be damaged: it holds a digest of its content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from models import Method
from models.lazymar.flops import Flops
from util import machine
from util.errors import InputError
from util.files import atomic_write
from util.reproduction.timing import Latency
from util.scoring.jackknife import Spread
from util.scoring.scores import Scores

FORMAT = 3  # of the files; raised when a field changes

METHOD_FIELDS = [field.name for field in dataclasses.fields(Method)]

T = TypeVar("T", bound="Result")


@dataclass(frozen=True)
class Result:
    """Base of the results: dataclasses whose fields hold nothing that JSON cannot."""

    @classmethod
    def from_json(cls: type[T], content: dict[str, Any]) -> T:
        """The result that `dataclasses.asdict` and JSON have made `content` of."""
        return cls(**content)

    @property
    def unfinished(self) -> bool:
        """True while the evaluation that this result is for has not come to its end."""
        return False


@dataclass(frozen=True)
class Evaluation(Result):
    """A run of `eval.py` on all its images; None is what was not measured."""

    num_images: int
    fid: float | None
    inception_score: float | None
    seconds_per_image: float | None  # sampling and decoding
    sampling_seconds: float | None  # per image
    flops_per_image: int
    notes: list[str]  # on the scores
    precision: float | None = None
    recall: float | None = None
    kid: float | None = None
    fd_dinov2: float | None = None

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `metrics.json` holds, whichever network it was scored with."""

        _, scores = Scores.of_metrics(metrics)
        return cls(
            num_images=metrics["num_images"],
            fid=scores.fid,
            inception_score=scores.is_mean,
            seconds_per_image=metrics.get("seconds_per_image"),
            sampling_seconds=metrics.get("sampling_seconds"),
            flops_per_image=metrics["flops_per_image"],
            notes=list(scores.notes),
            precision=scores.precision,
            recall=scores.recall,
            kid=scores.kid_mean,
            fd_dinov2=scores.fd_dinov2,
        )


@dataclass(frozen=True)
class Row(Result):
    """A row of the table: a model with one of the two methods.

    flops_per_step: of one image.
    not_run:        why there is no evaluation, in words; None if there is one, or will be.
    latency:        of one image with random weights, where those of the model are missing.
    """

    model: str
    method: str
    parameters: int
    flops_per_step: list[Flops]
    not_run: str | None = None
    latency: Latency | None = None
    evaluation: Evaluation | None = None

    @staticmethod
    def name(model: str, method: str) -> str:
        """The name of a row's file."""
        return f"{model}-{method.lower()}"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        latency, evaluation = content["latency"], content["evaluation"]
        read = {
            "flops_per_step": [Flops(*step) for step in content["flops_per_step"]],
            "latency": latency and Latency(**latency),
            "evaluation": evaluation and Evaluation(**evaluation),
        }
        return cls(**{**content, **read})

    @property
    def flops(self) -> Flops:
        """FLOPs of one image, by part."""
        return Flops.of_steps(self.flops_per_step)

    @property
    def seconds(self) -> float | None:
        """Seconds per image, of the evaluation or else with random weights."""
        if self.evaluation is not None:
            return self.evaluation.seconds_per_image
        return None if self.latency is None else self.latency.seconds

    @property
    def is_timed(self) -> bool:
        """True if there are seconds per image, of an evaluation or with random weights."""
        return self.evaluation is not None or self.latency is not None

    @property
    def unfinished(self) -> bool:
        return self.evaluation is None and self.not_run is None


@dataclass(frozen=True)
class Comparison(Result):
    """The images of one policy, or of the baseline, beside the baseline's images of the same seeds.

    ablation, label:         the setting that is varied and its value; None and "baseline" for the baseline.
    sampling_seconds:        per image, of the whole run; None if no time was taken.
    fid_difference:          from the baseline's FID.
    pixel_distance:          mean absolute difference from the baseline's images, of 255.
    pixel_distance_by_group: of the groups of images that the standard errors are over.
    notes:                   on the scores.
    """

    ablation: str | None
    label: str
    num_images: int
    sampling_seconds: float | None
    flops_per_image: int
    fid: Spread
    inception_score: Spread
    fid_difference: Spread
    pixel_distance: Spread
    pixel_distance_by_group: list[float]
    notes: list[str]

    @staticmethod
    def name(ablation: str | None, label: str) -> str:
        """The name of the file of a setting, or of the baseline (None, "baseline")."""
        return "-".join(filter(None, ("ablation", ablation, label))).replace(" ", "-")

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Comparison:
        spreads = ("fid", "inception_score", "fid_difference", "pixel_distance")
        return cls(**{**content, **{name: Spread(*content[name]) for name in spreads}})

    def speed_up(self, baseline: Comparison) -> float:
        """The baseline's sampling time divided by this one's; nan if one of them is not known."""
        if not (self.sampling_seconds and baseline.sampling_seconds):
            return float("nan")
        return baseline.sampling_seconds / self.sampling_seconds


@dataclass(frozen=True)
class Costs:
    """What the plan of a method costs a model, per image.

    transformer_steps: one after the other.
    head_evaluations:  one after the other, of all autoregressive steps together.
    cached_numbers:    in the token cache and the condition cache.
    """

    flops: Flops
    transformer_steps: int
    head_evaluations: int
    cached_numbers: int


@dataclass(frozen=True)
class MethodScores:
    """The scores of a method's images, each with its standard error.

    fid_difference:    from LazyMAR's FID, over images of the same seeds.
    share_intended:    of the images whose class, as the classifier sees it, is the one that was asked for.
    intended_by_class: that share by class, without an error.
    notes:             on the scores.
    """

    fid: Spread
    inception_score: Spread
    fid_difference: Spread
    share_intended: Spread
    intended_by_class: list[float]
    notes: list[str]


@dataclass(frozen=True)
class FrontierPoint(Result):
    """A method: what it costs each model, and how good the embedded model's images are with it.

    method:     its name.
    settings:   those that differ from MAR's, in words.
    costs:      by model.
    not_run:    why nothing was evaluated, in words; None if it was.
    evaluation: of the embedded model.
    scores:     of the same images.
    """

    method: str
    settings: str
    costs: dict[str, Costs]
    not_run: str | None = None
    evaluation: Evaluation | None = None
    scores: MethodScores | None = None

    @staticmethod
    def name(method: str) -> str:
        """The name of the file of a method."""
        return f"frontier-{method}"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> FrontierPoint:
        costs = {
            model: Costs(**{**costs, "flops": Flops(*costs["flops"])}) for model, costs in content["costs"].items()
        }
        evaluation, scores = content["evaluation"], content["scores"]
        spreads = ("fid", "inception_score", "fid_difference", "share_intended")
        read = {
            "costs": costs,
            "evaluation": evaluation and Evaluation(**evaluation),
            "scores": scores and MethodScores(**{**scores, **{name: Spread(*scores[name]) for name in spreads}}),
        }
        return cls(**{**content, **read})


@dataclass(frozen=True)
class Band:
    """A number by step or by distance: its mean, and the range that holds the middle 80 % of what was seen."""

    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Redundancy(Result):
    """Similarities between the steps of the baseline, which LazyMAR's caches live on.

    Each `Band` of `values` and `output` is by step, each of the others by distance.

    num_images:        that were looked at.
    layer:             the decoder block of `values`, where LazyMAR compares rows.
    steps:             those compared with the one before, 1 to num_iter - 1.
    distances:         of the steps compared, from 1.
    values:            by group of rows, the cosine similarity of a row's values to its own, averaged over heads.
    output:            likewise, of the last block's output.
    similarity:        of the last block's difference between the branches, at the rows predicted at the later step: the
                       cosine similarity.
    change:            likewise, the norm of the change, relative to that of the later difference.
    error_difference:  of the unconditional branch there, relative to its norm, if the earlier step's difference is
                       added to the conditional branch.
    error_output:      likewise, if the earlier step's unconditional branch is taken itself.
    """

    num_images: int
    layer: int
    steps: list[int]
    distances: list[int]
    values: dict[str, Band]
    output: dict[str, Band]
    similarity: Band
    change: Band
    error_difference: Band
    error_output: Band

    @staticmethod
    def name(model: str) -> str:
        """The name of the file on a model."""
        return f"{model}-redundancy"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Redundancy:
        by_step = {
            name: {group: Band(**band) for group, band in content[name].items()} for name in ("values", "output")
        }
        by_distance = ("similarity", "change", "error_difference", "error_output")
        return cls(**{**content, **by_step, **{name: Band(**content[name]) for name in by_distance}})


@dataclass(frozen=True)
class Inputs:
    """Inputs of a result, which stands as long as they are the same.

    settings:        of the run behind it, as `Options.settings` names them.
    files:           SHA-256 of the weights and statistics by path, None if there is no such file; empty if no file was
                     used.
    num_images:      that were compared or looked at, if not all of the run's.
    baseline_images: in the run that is compared with.
    metrics:         flags of the metrics besides FID and Inception Score.
    """

    settings: dict[str, Any]
    files: dict[str, str | None]
    num_images: int | None = None
    baseline_images: int | None = None
    metrics: list[str] = dataclasses.field(default_factory=list)

    def differ_in_policy_alone(self, other: Inputs) -> bool:
        """True if results of both inputs differ at most in the policy and in how many images were made with it."""
        return self._without("cache", "lazy_mar", "num_images") == other._without("cache", "lazy_mar", "num_images")

    def differ_in_method_alone(self, other: Inputs) -> bool:
        """True if results of both inputs differ at most in the method and in the metrics that were computed."""
        one, another = (inputs._without("cache", "lazy_mar", *METHOD_FIELDS) for inputs in (self, other))
        return dataclasses.replace(one, metrics=[]) == dataclasses.replace(another, metrics=[])

    def _without(self, *names: str) -> Inputs:
        settings = {name: value for name, value in self.settings.items() if name not in names}
        return dataclasses.replace(self, settings=settings)


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement.

    environment: versions and processor, see `machine.describe`.
    device:      and its host.
    date:        UTC, ISO 8601.
    """

    environment: dict[str, str]
    device: str
    processes: int
    date: str

    @classmethod
    def now(cls, device: torch.device, processes: int) -> Conditions:
        """The conditions of a measurement that ends now."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(machine.describe(device), machine.where(device), processes, date)


@dataclass(frozen=True)
class Record(Generic[T]):
    """A result with its inputs and the conditions in which it was measured."""

    result: T
    inputs: Inputs
    conditions: Conditions


class Results:
    """The files of results in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def read(self, kind: type[T], name: str) -> Record[T] | None:
        """The result of a kind (`Row`, `Comparison`, `FrontierPoint` or `Redundancy`); None if there is none.

        Raises InputError if its file is damaged, or of another version of this program.
        """
        path = self.path(name)
        try:
            file = json.loads(path.read_text())
            if file["format"] != FORMAT:
                raise ValueError("another version of this program wrote it")
            if file["digest"] != _digest(file["record"]):
                raise ValueError("its content does not match its digest")
            content = file["record"]
            inputs, conditions = Inputs(**content["inputs"]), Conditions(**content["conditions"])
            return Record(kind.from_json(content["result"]), inputs, conditions)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged or of another version ({error!r}): run reproduce.py again, which makes it anew"
            ) from None

    def write(self, name: str, record: Record[T]) -> None:
        """Write a result. Raises InputError if that cannot be done."""
        content = dataclasses.asdict(record)
        try:
            with atomic_write(self.path(name)) as partial:
                file = {"format": FORMAT, "digest": _digest(content), "record": content}
                partial.write_text(json.dumps(file, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path(name)}: {error.strerror}") from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
