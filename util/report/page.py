"""Draws the page: one file with tables and figures, which needs no network. Its text is in `page.html`."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from models import CachePolicy
from util.files import atomic_write
from util.folder import side_by_side
from util.report import figures, paper
from util.report.results import Row, compare
from util.study import SMALL_MODEL, TABLE_METHODS, Study

HERE = Path(__file__).parent
MODEL_DRAWN = "mar_huge"  # whose plans are drawn


def write_page(study: Study, steps: Mapping[str, Any]) -> Path:
    """Draw the page of a study's run folders, write it with its pictures beside it, and return its path.

    `steps` is what `measure_steps` of reproduce.py returns, by model.
    """
    table = {key: Row(options) for key, options in study.table.items()}
    methods, baseline = {}, table[SMALL_MODEL, "mar"]
    for name, options in study.methods.items():
        row = Row(options)
        methods[name] = row, compare(row, baseline, row.num_images)
    pictures = draw(table, methods, steps)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals.update(cite=cite, number=number, spread=spread, paper=paper)
    page = environment.get_template("page.html").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        models=list(dict.fromkeys(model for model, _ in table)),
        table=table,
        methods=methods,
        steps=steps,
        num_compared=study.args.ablation_images,
        policies=study.ablations,
        paper_policy=CachePolicy(),
        conditions=sorted({row.conditions() for row in table.values() if row.folder}),
    )
    folder = study.args.output_dir
    files = {"report.html": page.encode(), **{f"{name}.png": png for name, png in pictures.items()}}
    for name, content in files.items():
        with atomic_write(folder / name) as partial:
            partial.write_bytes(content)
    return folder / "report.html"


def draw(table: Mapping, methods: Mapping, steps: Mapping) -> dict[str, bytes]:
    """Draw the pictures that the finished runs allow, by name."""
    drawn = {"MAR": table[MODEL_DRAWN, "mar"].options, "LazyMAR": table[MODEL_DRAWN, "lazymar"].options}
    plans = {name: options.plan for name, options in drawn.items()}
    pictures = {"rows_by_step": figures.rows_by_step(plans, drawn["MAR"].meta_model.buffer_size)}
    if compared := {name: pair for name, pair in methods.items() if pair[1]}:
        pictures["frontier"] = figures.frontier(compared)
    for model in dict.fromkeys(model for model, _ in table):
        baseline, lazymar = (table[model, method] for method in TABLE_METHODS)
        if baseline.folder and lazymar.folder:
            pictures[f"side_by_side_{model}"] = side_by_side(baseline.folder, lazymar.folder)
        if model in steps:
            pictures[f"redundancy_{model}"] = figures.redundancy(steps[model]["redundancy"])
            if caches := steps[model]["ablations"].get("caches"):
                pictures[f"errors_{model}"] = figures.errors_by_step(caches)
    return pictures


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Write a number, or a dash for one that is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def spread(measured: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Write a number with its standard error."""
    value, error = measured
    return f"{number(value, digits, sign)} ± {number(error, digits)}"


def cite(arxiv: str) -> Markup:
    """Link a paper by its arXiv number."""
    return Markup('<a href="https://arxiv.org/abs/{}">arXiv {}</a>').format(arxiv, arxiv)
