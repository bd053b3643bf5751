"""The report's version of the paper's main table: our figures, the paper's below them, and remarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from models import PRESETS
from util.report.findings import Findings
from util.report.words import number, row_title
from util.reproduction.paper import PARAMETERS, TABLE, TABLE_METHODS
from util.reproduction.results import Evaluation, Record, Row
from util.runs.methods import record_settings
from util.runs.options import Options

LABELS = ("Model", "FID", "IS", "s per image", "TFLOPs", "Parameters", "Speed-up")
PAPER_IMAGES = 50_000


class Cell(NamedTuple):
    """A cell of the table: our figure with its unit, and what stands in small print below it."""

    value: str
    unit: str = ""
    details: Sequence[str] = ()


class TableRow(NamedTuple):
    """A row of the table: a cell for each of `LABELS`, and the remarks below them."""

    cells: Sequence[Cell]
    remarks: Sequence[str]


def table_rows(findings: Findings) -> list[TableRow]:
    """All rows of which there is a result."""
    rows = []
    for (model, method), record in findings.rows.items():
        baseline = findings.rows.get((model, "baseline"))
        remarks = remarks_on(record, findings.images_made(model, method))
        rows.append(TableRow(cells(record.result, baseline.result if baseline else None), remarks))
    return rows


def cells(row: Row, baseline: Row | None) -> list[Cell]:
    """The cells of a row; without the result of the baseline there is no speed-up."""
    paper, evaluation = TABLE.get((row.model, row.method)), row.evaluation
    tflops = row.flops.total / 1e12
    speed_up = Cell("–")
    if baseline is not None:
        details = []
        if row.seconds and baseline.seconds and bool(evaluation) == bool(baseline.evaluation):
            details.append(f"{baseline.seconds / row.seconds:.2f}× time")
        if paper:
            details.append(f"paper {paper.speed_up:.2f}")
        speed_up = Cell(f"{baseline.flops.total / row.flops.total:.2f}×", " FLOPs", details)
    counted = {"paper": paper.tflops, "code": paper.counted_tflops} if paper else {}
    fid = beside_paper(evaluation.fid if evaluation else None, paper.fid if paper else None, 2)
    return [
        Cell(row_title(row.model, row.method)),
        fid._replace(details=[*fid.details, *(more_scores(evaluation) if evaluation else ())]),
        beside_paper(
            evaluation.inception_score if evaluation else None,
            paper.inception_score if paper else None,
            1 if paper else 2,
        ),
        Cell(
            "–" if row.seconds is None else f"{row.seconds:.3g}",
            details=[f"paper {paper.gpu_seconds:.2f} GPU, {paper.cpu_seconds:.1f} CPU"] if paper else (),
        ),
        Cell(
            f"{tflops:.4g}",
            details=[f"{name} {theirs:.2f} ({tflops / theirs - 1:+.1%})" for name, theirs in counted.items()],
        ),
        Cell(
            f"{row.parameters / 1e6:.4g} M",
            details=[f"paper {PARAMETERS[row.model] / 1e6:.0f} M"] if paper else (),
        ),
        speed_up,
    ]


def more_scores(evaluation: Evaluation) -> list[str]:
    """The scores besides FID and Inception Score, those that were computed."""
    scores = {
        "precision": (evaluation.precision, 3),
        "recall": (evaluation.recall, 3),
        "KID": (evaluation.kid, 5),
        "FD-DINOv2": (evaluation.fd_dinov2, 1),
    }
    return [f"{name} {value:.{digits}f}" for name, (value, digits) in scores.items() if value is not None]


def beside_paper(own: float | None, paper: float | None, digits: int) -> Cell:
    """A score with the paper's and the difference below it; one that compares with no paper's has a star."""
    if paper is None:
        return Cell(number(own, digits), "*" if own is not None else "")
    difference = f" ({own - paper:+.{digits}f})" if own is not None else ""
    return Cell(number(own, digits), details=[f"paper {paper:.{digits}f}{difference}"])


def remarks_on(record: Record[Row], images_made: int) -> list[str]:
    """Remarks on what keeps a row from being a final figure of the paper's setting, and on its scores."""
    row, remarks = record.result, []
    if row.unfinished:
        wanted = record.inputs.settings["num_images"]
        remarks.append(f"PARTIAL: {images_made:,} of {wanted:,} images are made, and none scored; run again")
    elif row.latency:
        remarks.append(f"NOT RUN: {row.not_run}")
        remarks.append(f"RANDOM WEIGHTS: seconds are of one image, random weights, {row.latency.how}")
    elif row.not_run:
        remarks.append(f"NOT RUN: {row.not_run}; FLOPs and parameters need no weights")
    if others := other_settings(record):
        remarks.append(f"OTHER SETTINGS than the paper's: {'; '.join(others)}")
    return remarks + (row.evaluation.notes if row.evaluation else [])


def other_settings(record: Record[Row]) -> list[str]:
    """The settings that differ from the paper's, in words."""
    row, settings = record.result, record.inputs.settings
    defaults, method = Options(model=row.model), TABLE_METHODS[row.method]
    paper = {name: getattr(defaults, name) for name in ("cfg_schedule", "temperature")}
    paper.update(num_iter=method.num_iter, num_sampling_steps=method.num_sampling_steps)
    paper["cfg"] = PRESETS[row.model].cfg
    if row.evaluation or row.unfinished:
        paper["num_images"] = PAPER_IMAGES
    paper.update(json.loads(json.dumps(record_settings(method)["cache"])))
    own = {**settings, **settings["cache"]}
    return [f"{name} {own[name]} instead of {value}" for name, value in paper.items() if own.get(name) != value]
