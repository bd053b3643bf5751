"""Reads all results that `reproduce.py` has left in a folder, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models import PRESETS
from util.errors import InputError
from util.reproduction.ablations import ABLATIONS
from util.reproduction.frontier import FRONTIER
from util.reproduction.paper import TABLE_METHODS
from util.reproduction.results import Comparison, FrontierPoint, Record, Redundancy, Results, Row, T


@dataclass(frozen=True)
class Findings:
    """The results in a folder, each with what it was measured on.

    folder:     of the runs; its `results/` holds what was read.
    rows:       of the table, by model and method.
    baseline:   the baseline's images that the ablations are compared with.
    ablations:  by name, each setting's comparison by its label, in `ABLATIONS`' order; those that can be compared with
                `baseline` and no others.
    frontier:   by method, in the order of `FRONTIER`; those that differ from the first in nothing but the method.
    redundancy: by model.
    damaged:    a sentence for each file that could not be read.
    """

    folder: Path
    rows: dict[tuple[str, str], Record[Row]]
    baseline: Record[Comparison] | None
    ablations: dict[str, dict[str, Record[Comparison]]]
    frontier: dict[str, Record[FrontierPoint]]
    redundancy: dict[str, Record[Redundancy]]
    damaged: list[str]

    @classmethod
    def read(cls, folder: Path) -> Findings:
        """Read a folder. Raises InputError if there is nothing to report on."""
        files, damaged = Results(folder / "results"), []

        def read(kind: type[T], name: str) -> Record[T] | None:
            try:
                return files.read(kind, name)
            except InputError as error:
                damaged.append(str(error))
                return None

        rows = {(model, method): read(Row, Row.name(model, method)) for model in PRESETS for method in TABLE_METHODS}
        redundancy = {model: read(Redundancy, Redundancy.name(model)) for model in PRESETS}
        baseline = read(Comparison, Comparison.name(None, "baseline"))
        ablations = {}
        for name, ablation in ABLATIONS.items():
            read_ones = {label: read(Comparison, Comparison.name(name, label)) for label in ablation.policies}
            ablations[name] = {
                label: record
                for label, record in read_ones.items()
                if record and baseline and record.inputs.differ_in_policy_alone(baseline.inputs)
            }
        names = [path.stem.partition("-")[2] for path in sorted(files.folder.glob(f"{FrontierPoint.name('*')}.json"))]
        names.sort(key=lambda name: FRONTIER.index(name) if name in FRONTIER else len(FRONTIER))
        points = {name: point for name in names if (point := read(FrontierPoint, FrontierPoint.name(name)))}
        first = next(iter(points.values()), None)
        findings = cls(
            folder=folder,
            rows={key: record for key, record in rows.items() if record},
            baseline=baseline,
            ablations={name: settings for name, settings in ablations.items() if settings},
            frontier={
                name: point
                for name, point in points.items()
                if first and point.inputs.differ_in_method_alone(first.inputs)
            },
            redundancy={model: record for model, record in redundancy.items() if record},
            damaged=damaged,
        )
        if not findings.records():
            raise InputError(damaged[0] if damaged else f"{files.folder} holds no results: run reproduce.py first")
        return findings

    def records(self) -> dict[str, Record]:
        """All results, by name."""
        records: dict[str, Record] = {Row.name(*key): record for key, record in self.rows.items()}
        if self.baseline is not None:
            records[Comparison.name(None, "baseline")] = self.baseline
        for name, settings in self.ablations.items():
            records.update({Comparison.name(name, label): record for label, record in settings.items()})
        records.update({FrontierPoint.name(name): record for name, record in self.frontier.items()})
        records.update({Redundancy.name(model): record for model, record in self.redundancy.items()})
        return dict(sorted(records.items()))

    def images_made(self, model: str, method: str) -> int:
        """The number of images in the folder of a row's run."""
        return len(list(self.images(model, method).glob("*.png")))

    def images(self, model: str, method: str) -> Path:
        """The folder with the images of a row's run."""
        return self.folder / model / method.lower() / "images"

    def lacking(self, ablation: str) -> list[str]:
        """The labels of the settings of an ablation of which there is no result."""
        return [label for label in ABLATIONS[ablation].policies if label not in self.ablations[ablation]]
