"""Makes the report's page: the data and pictures of each section. Its text is in page.html and captions.html."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from models import PRESETS
from util.machine import DTYPES
from util.report import figures, words
from util.report.findings import Findings
from util.report.table import LABELS, table_rows
from util.reproduction.ablations import ABLATED_MODEL, ABLATIONS, PAPER_POLICY
from util.reproduction.paper import (
    GTR_TABLE,
    GTR_TABLE_SOURCE,
    LAZYMAR_PAPER,
    MAR_PAPER,
    OTHER_METHODS,
    TABLE,
    TABLE_METHODS,
)
from util.reproduction.results import Comparison, Costs, Row
from util.runs.options import Options, check

HERE = Path(__file__).parent
PAIRS = 10  # of images by the two methods, at most
ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.globals.update(
    cite=words.cite,
    distance=words.distance,
    mark_up=words.mark_up,
    mean=fmean,
    number=words.number,
    percent=words.percent,
    spread=words.spread,
    zip=zip,
    lazymar_paper=LAZYMAR_PAPER,
    mar_paper=MAR_PAPER,
    other_methods=OTHER_METHODS,
    gtr_table=GTR_TABLE,
    gtr_table_source=GTR_TABLE_SOURCE,
)
CAPTIONS: Any = ENVIRONMENT.get_template("captions.html").module  # a function for each macro


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    name:    of its file, without the ending.
    png:     the file.
    alt:     what is on it, for those who do not see it.
    caption: HTML.
    """

    name: str
    png: bytes
    alt: str
    caption: Markup

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def render(findings: Findings) -> tuple[str, list[Picture]]:
    """The page, and the pictures on it."""
    ablations = list(ablation_parts(findings))
    sections = {
        "quality_and_speed": list(quality_and_speed(findings)),
        "frontier": list(frontier(findings)),
        "pairs": list(pairs(findings)),
        "ablation_pictures": [ablation.picture for ablation in ablations],
        "redundancy": list(redundancy(findings)),
        "flops": list(flops(findings)),
    }
    page = ENVIRONMENT.get_template("page.html").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        small_model=small_model(findings),
        problems=problems(findings),
        labels=LABELS,
        rows=table_rows(findings),
        baseline=findings.baseline.result if findings.baseline else None,
        ablations=ablations,
        points={name: record.result for name, record in findings.frontier.items()},
        small=ABLATED_MODEL,
        costs=list(costs(findings)),
        conditions=conditions(findings),
        **sections,
    )
    return page, [picture for pictures in sections.values() for picture in pictures]


# Words


class SmallModel(NamedTuple):
    """The embedded model's results in words; pairs are the baseline's and LazyMAR's."""

    speed_up: str
    flops: str
    fids: tuple[str, str]
    num_images: tuple[str, str]


def small_model(findings: Findings) -> SmallModel | None:
    """The embedded model's results in words; None unless both methods were evaluated."""
    rows = [findings.rows[key].result for method in TABLE_METHODS if (key := (ABLATED_MODEL, method)) in findings.rows]
    evaluations = [row.evaluation for row in rows if row.evaluation]
    if len(evaluations) < 2:
        return None
    before, after = rows
    fids, counts = zip(*((words.number(each.fid), f"{each.num_images:,}") for each in evaluations))
    speed_up = before.seconds / after.seconds if before.seconds and after.seconds else None
    return SmallModel(words.number(speed_up, 1), f"{after.flops.total / before.flops.total:.0%}", fids, counts)


def problems(findings: Findings) -> list[str]:
    """Sentences on what is not finished, not there or damaged."""
    unfinished = [words.row_title(*key) for key, record in findings.rows.items() if record.result.unfinished]
    for name in findings.ablations:
        if lacking := findings.lacking(name):
            unfinished.append(f"{ABLATIONS[name].title.lower()} {', '.join(lacking)}")
    lost = [
        Row.name(model, method) for model in PRESETS for method in TABLE_METHODS if (model, method) not in findings.rows
    ]
    found = [f"PARTIAL: not finished are {'; '.join(unfinished)}."] if unfinished else []
    found += [f"PARTIAL: there is no result of {', '.join(lost)}."] if lost else []
    return found + findings.damaged


def conditions(findings: Findings) -> list[str]:
    """Lines on the machine, versions and time of measurement: one for all results that have these in common."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for name, record in findings.records().items():
        measured = record.conditions
        environment = ", ".join(f"{key} {value}" for key, value in measured.environment.items())
        dtype = record.inputs.settings["dtype"]
        line = f"{measured.device}, {dtype}, {measured.processes} process(es); {environment}"
        lines.setdefault(line, []).append((measured.date, name))
    texts = []
    for line, results in lines.items():
        first, last = min(results)[0], max(results)[0]
        what = f"{len(results)} results" if len(results) > 4 else ", ".join(name for _, name in results)
        texts.append(f"{what}, {first if first == last else f'{first} to {last}'}: {line}")
    return texts


# Pictures


def quality_and_speed(findings: Findings) -> Iterator[Picture]:
    """Published figures, with our own of the same models, and the ablations of the embedded model."""
    measured = {}
    for model in ("mar_base", "mar_large", "mar_huge"):
        rows = [findings.rows[key].result for method in TABLE_METHODS if (key := (model, method)) in findings.rows]
        fids = [row.evaluation.fid for row in rows if row.evaluation and row.evaluation.fid is not None]
        if len(fids) == 2:
            measured[model] = [(rows[0].flops.total / row.flops.total, fid) for row, fid in zip(rows, fids)]
    yield Picture(
        "quality_and_speed",
        figures.quality_and_speed(measured),
        "FID against speed-up of MAR and LazyMAR at three sizes, and of GtR, MARché and DiSA",
        CAPTIONS.quality_and_speed(len(measured)),
    )
    if findings.baseline:
        baseline = findings.baseline.result
        settings = {
            ABLATIONS[name].title: [record.result for record in records.values()]
            for name, records in findings.ablations.items()
        }
        yield Picture(
            "small_model",
            figures.small_model_quality_and_speed(baseline, settings),
            "FID of mar_tiny against the measured speed-up for every setting of the ablations",
            CAPTIONS.small_model(baseline),
        )


def frontier(findings: Findings) -> Iterator[Picture]:
    """Quality against speed of every method on the embedded model, if two were evaluated, beside published figures."""
    points = {name: record.result for name, record in findings.frontier.items()}
    if sum(point.scores is not None for point in points.values()) >= 2:
        yield Picture(
            "frontier",
            figures.frontier(points, ABLATED_MODEL),
            "FID of mar_tiny against seconds and FLOPs for each method, and published figures of MAR-H",
            CAPTIONS.frontier(points),
        )


class ModelCosts(NamedTuple):
    """What each method costs a model, by the method's name, and how many bytes a cached number has."""

    title: str
    methods: dict[str, Costs]
    itemsize: int


def costs(findings: Findings) -> Iterator[ModelCosts]:
    """The costs of each model, the paper's first; those of several methods were counted alike."""
    for model in PRESETS:
        methods = {name: record.result.costs[model] for name, record in findings.frontier.items()}
        if methods:
            dtype = "float32" if model == ABLATED_MODEL else "bfloat16"
            title = f"MAR-{words.MODEL_NAMES[model]}" if (model, "baseline") in TABLE else model
            yield ModelCosts(title, methods, DTYPES[dtype].itemsize)


def pairs(findings: Findings) -> Iterator[Picture]:
    """The first images of each model by both methods, if they were made with the same seed."""
    for model in PRESETS:
        folders = [findings.images(model, method) for method in TABLE_METHODS]
        there = [all((folder / f"{index:06d}.png").exists() for folder in folders) for index in range(PAIRS)]
        count = there.index(False) if False in there else PAIRS
        records = [findings.rows[key] for method in TABLE_METHODS if (key := (model, method)) in findings.rows]
        seeds = {record.inputs.settings["seed"] for record in records}
        if count >= 2 and len(seeds) == 1:
            yield Picture(
                f"pairs_{model}",
                figures.image_pairs(*folders, count),
                f"Images of {model} by the baseline and by LazyMAR from the same seeds, and their difference",
                CAPTIONS.pairs(model, count, seeds.pop()),
            )


class AblationPart(NamedTuple):
    """An ablation: a picture, and the settings in the table, of which `base` is the paper's (None: not measured)."""

    title: str
    picture: Picture
    settings: list[Comparison]
    base: Comparison | None


def ablation_parts(findings: Findings) -> Iterator[AblationPart]:
    """Each ablation of which something was measured."""
    if findings.baseline is None:
        return
    for name, records in findings.ablations.items():
        ablation, settings = ABLATIONS[name], [record.result for record in records.values()]
        paper_label = next(label for label, policy in ablation.policies.items() if policy == PAPER_POLICY)
        base = next((setting for setting in settings if setting.label == paper_label), None)
        picture = Picture(
            f"ablation_{name}",
            figures.ablation(ablation.title, settings, findings.baseline.result, paper_label),
            f"Distance to the baseline's images, FID against the baseline's, and speed-up by {ablation.title.lower()}",
            CAPTIONS.ablation(ablation.title, settings, base, findings.lacking(name)),
        )
        yield AblationPart(ablation.title, picture, settings, base)


def redundancy(findings: Findings) -> Iterator[Picture]:
    """Two pictures for each model: on the token cache and on the condition cache."""
    for model, record in findings.redundancy.items():
        yield Picture(
            f"similarity_{model}",
            figures.similarity_by_step(record.result),
            "Change of token features between adjacent steps, for three groups of rows",
            CAPTIONS.similarity(model, record.result),
        )
        yield Picture(
            f"guidance_{model}",
            figures.guidance_by_distance(record.result),
            "Similarity of the difference between the branches at different steps, by their distance",
            CAPTIONS.guidance(model, record.result),
        )


def flops(findings: Findings) -> Iterator[Picture]:
    """The rows that are computed at each step, and FLOPs by part and by step."""
    yield rows_by_step()
    baselines = {model: record.result.flops.total for (model, method), record in findings.rows.items()
                 if method == "baseline"}  # fmt: skip
    rows = {words.row_title(*key): record.result for key, record in findings.rows.items() if key[0] in baselines}
    if rows:
        yield Picture(
            "flops_by_part",
            figures.flops_by_part(
                {title: row.flops for title, row in rows.items()},
                {title: baselines[row.model] for title, row in rows.items()},
            ),
            "FLOPs per image of each model by encoder, decoder and head, as shares of the baseline's",
            CAPTIONS.flops_by_part(),
        )
    for model in ("mar_huge", ABLATED_MODEL):
        steps = {
            words.network_name(method): findings.rows[model, method].result.flops_per_step
            for method in TABLE_METHODS
            if (model, method) in findings.rows
        }
        if len(steps) == 2:
            yield Picture(
                f"flops_by_step_{model}",
                figures.flops_by_step(steps),
                f"FLOPs of {model} at each step, by part, baseline above LazyMAR",
                CAPTIONS.flops_by_step(model),
            )


def rows_by_step() -> Picture:
    """The rows that the paper's models compute at each of 64 steps, by the plan of each method."""
    options = check(Options())
    buffer_size, seq_len = options.meta_model.buffer_size, options.meta_model.seq_len
    plans = {
        words.network_name(method): replace(options, method=its_method).plan
        for method, its_method in TABLE_METHODS.items()
    }
    return Picture(
        "rows_by_step",
        figures.rows_by_step(plans, buffer_size, seq_len),
        "Rows that the encoder and the decoder compute at each of 64 steps, MAR above LazyMAR",
        CAPTIONS.rows_by_step(buffer_size, seq_len),
    )
