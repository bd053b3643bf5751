"""One command of `reproduce.py` as a list of evaluations, with the inputs of each."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from models import CachePolicy, Method
from models.lazymar.methods import name_of
from util.errors import InputError
from util.files import file_digest
from util.reproduction.ablations import ABLATED_MODEL, ABLATIONS, choose_ablations, run_name
from util.reproduction.paper import TABLE_METHODS, name_in_table
from util.reproduction.results import Inputs
from util.runs.folder import check_folder
from util.runs.methods import with_steps
from util.runs.options import CheckedOptions, Options, check
from util.scoring.scores import FID_AND_IS, Metrics, load_extractor

ABLATION_IMAGES = 500


@dataclass(frozen=True)
class Study:
    """The flags of `reproduce.py`, each by its name. None stands for a default that depends on the model."""

    models: Sequence[str]
    num_images: int | None
    eval_bsz: int | None
    num_iter: int
    num_sampling_steps: int
    seed: int
    device: str
    dtype: str
    inception_weights: Path | None
    statistics: Path | None
    metrics: Metrics
    ablations: Sequence[str]
    method: Mapping[str, Method]
    ablation_images: int | None
    output_dir: Path
    overwrite: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Study:
        """The study of a parsed command line. Raises InputError if there are fewer images than ablations compare."""
        study = cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})
        available = study.options(ABLATED_MODEL, Method()).num_images
        if study.settings() and study.num_compared > available:
            raise InputError(f"--ablation_images must be at most the {available} images of {ABLATED_MODEL}'s rows")
        return study

    @property
    def num_compared(self) -> int:
        """The images of each ablation that are compared with the baseline's."""
        return self.ablation_images or min(ABLATION_IMAGES, self.options(ABLATED_MODEL, Method()).num_images)

    def settings(self) -> list[tuple[str, str, CachePolicy]]:
        """(ablation, label, policy) of each setting that is to be compared with the baseline."""
        chosen = choose_ablations(self.ablations) if ABLATED_MODEL in self.models else {}
        return [
            (name, label, policy) for name, ablation in chosen.items() for label, policy in ablation.policies.items()
        ]

    def check_folders(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise InputError if the folder of an evaluation holds a run that was begun with other settings."""
        methods = {model: list(TABLE_METHODS.values()) for model in self.models}
        if ABLATED_MODEL in methods:
            methods[ABLATED_MODEL] += [Method(cache=policy) for *_, policy in self.settings()]
            methods[ABLATED_MODEL] += self.method.values()
        for model, of_model in methods.items():
            for method in of_model:
                options = self.options(model, method)
                check_folder(options.output_dir, options.settings(device, dtype))

    def options(self, model: str, method: Method) -> CheckedOptions:
        """The options of the evaluation of a model with a method: of the table, of an ablation, or of the frontier.

        What several of them have in common is evaluated once, under one name.
        """
        is_official = model != ABLATED_MODEL
        is_meant = is_official or list(self.models) == [ABLATED_MODEL]  # by flags that go with one kind of features
        in_table, in_ablation = name_in_table(method), self._name_in_ablations(method)
        num_images = self.num_images or (50_000 if is_official else 2_000)
        if in_table is not None:
            folder = Path(in_table.lower())
        elif in_ablation is not None:
            folder, num_images = Path("ablations", in_ablation), self.num_compared
        else:
            folder = Path("frontier", str(name_of(method)))
        return check(
            Options(
                model=model,
                num_images=num_images,
                eval_bsz=self.eval_bsz or (128 if is_official else 25),
                method=with_steps(method, self.num_iter, self.num_sampling_steps),
                seed=self.seed,
                device=self.device,
                dtype=self.dtype,
                inception_weights=self.inception_weights if is_official else None,
                statistics=self.statistics if is_meant else None,
                metrics=self.metrics if is_meant and in_table is not None else FID_AND_IS,
                output_dir=self.output_dir / model / folder,
                overwrite=self.overwrite,
            )
        )

    def _name_in_ablations(self, method: Method) -> str | None:
        """The name of the run of the first setting of an ablation that is a method; None if none is."""
        names = (
            run_name(name, label)
            for name, ablation in ABLATIONS.items()
            for label, policy in ablation.policies.items()
            if Method(cache=policy) == method
        )
        return next(names, None)


def inputs_of(options: CheckedOptions, device: torch.device, dtype: torch.dtype, *, files: bool = True) -> Inputs:
    """The inputs of an evaluation's result, with digests of its weights and statistics unless not `files`."""
    paths = (options.resume, options.vae_path, options.statistics) if files else ()
    settings = json.loads(json.dumps(options.settings(device, dtype)))  # as it will be read
    return Inputs(settings, {str(path): _digest(path) for path in paths})


@lru_cache
def _digest(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


def missing_file(options: CheckedOptions) -> str | None:
    """The file that an evaluation lacks, in words; None if it lacks nothing."""
    files = {"weights": options.resume, "VAE": options.vae_path, "statistics": options.statistics}
    for what, path in files.items():
        if not path.exists():
            return f"{what} missing: {path}"
    if options.preset.features == "inception":
        try:
            load_extractor("inception", options.inception_weights)
        except InputError as error:
            return str(error)
    return None
