"""Draws the page: one file with tables and figures, which needs no network. Its text is in `page.html`."""

import argparse
import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from models import CachePolicy
from util.files import atomic_write
from util.folder import side_by_side
from util.options import Options
from util.report import figures, paper
from util.report.results import Row, compare
from util.study import SMALL_MODEL, TABLE_METHODS

MODEL_DRAWN = "mar_huge"  # whose plan is drawn


def write_page(args: argparse.Namespace, runs: Mapping[tuple[str, str], Options], steps: Mapping[str, Any]) -> Path:
    """Draw the page of a study's run folders, write it with its pictures beside it, and return its path.

    `args` are the flags of reproduce.py, and `steps` is what its `measure_steps` returns, by model.
    """
    rows = {key: Row(options) for key, options in runs.items()}
    table = {(model, method): row for (model, method), row in rows.items() if method in TABLE_METHODS}
    own = {method: rows[SMALL_MODEL, method] for method in args.method}
    baseline = rows[SMALL_MODEL, "mar"]
    methods = {method: (row, compare(row, baseline)) for method, row in own.items()}
    pictures = draw(table, methods, steps)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("page.html").render(
        number=written,
        paper=paper,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        models=list(dict.fromkeys(model for model, _ in table)),
        table=table,
        methods=methods,
        baseline=baseline,
        steps=steps,
        num_compared=args.ablation_images,
        policies=args.ablations,
        paper_policy=CachePolicy(),
        conditions=sorted({row.conditions() for row in table.values() if row.folder}),
    )
    files = {"report.html": page.encode(), **{f"{name}.png": png for name, png in pictures.items()}}
    for name, content in files.items():
        with atomic_write(args.output_dir / name) as partial:
            partial.write_bytes(content)
    return args.output_dir / "report.html"


def draw(table: Mapping, methods: Mapping, steps: Mapping) -> dict[str, bytes]:
    """Draw the pictures that the finished runs allow, by name."""
    pictures = {"rows_by_step": figures.rows_by_step(table[MODEL_DRAWN, "lazymar"].options.plan)}
    if finished := {name: (row, compared) for name, (row, compared) in methods.items() if compared}:
        pictures["frontier"] = figures.frontier(finished)
    for model in dict.fromkeys(model for model, _ in table):
        folders = [table[model, method].folder for method in TABLE_METHODS]
        if all(folders):
            pictures[f"side_by_side_{model}"] = side_by_side(*folders)
    for model, measured in steps.items():
        pictures[f"redundancy_{model}"] = figures.redundancy(measured["redundancy"])
        if "caches" in measured["ablations"]:
            pictures[f"errors_{model}"] = figures.errors_by_step(measured["ablations"]["caches"])
    return pictures


def written(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Write a number, or a dash for one that is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"
