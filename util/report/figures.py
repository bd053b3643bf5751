"""The report's figures, in one style: one column wide, legible on a phone, told apart without colour."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from models.lazymar.flops import Flops
from models.lazymar.plan import Plan
from util.report.words import MODEL_NAMES
from util.reproduction.paper import GTR_TABLE, OTHER_METHODS, TABLE, TABLE_METHODS
from util.reproduction.results import Comparison, FrontierPoint, Redundancy

matplotlib.use("agg")  # files alone, no windows

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
MARKERS = "osD^vP"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
HATCHES = {"encoder": "///", "decoder": "", "head": "..."}
PART_COLOURS = {"encoder": SKY, "decoder": BLUE, "head": ORANGE}
WIDTH, DPI = 5.0, 200  # inches and dots per inch: 1000 pixels, which a phone shows at about a third
REUSED = "#e3e3e3"
LEAST_CHANGE = 1e-5  # what is shown for less, on a logarithmic axis
STYLE = {
    "font.size": 11.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}


def draw(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """A figure of so many inches' height with its panels one below the other."""
    figure, axes = plt.subplots(rows, 1, figsize=(WIDTH, height), squeeze=False, **options)
    return figure, axes[:, 0]


def png(figure: Figure) -> bytes:
    """The figure's PNG file; the figure is closed."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    plt.close(figure)
    # Few colours are in a plot, and a palette halves the page's size.
    stream.seek(0)
    reduced = io.BytesIO()
    Image.open(stream).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(reduced, "PNG", optimize=True)
    return reduced.getvalue()


def in_style(function: Callable[..., Figure]) -> Callable[..., bytes]:
    """Draw with `STYLE`, whatever the user's own settings are, and return the PNG file."""

    @functools.wraps(function)
    def drawn(*args: object) -> bytes:
        with plt.style.context(["default", STYLE]):
            return png(function(*args))

    return drawn


@in_style
def quality_and_speed(measured: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """FID over speed-up on ImageNet: the papers' figures, and ours where there are any.

    `measured`: by model, (speed-up, FID) of each of `TABLE_METHODS`.
    """
    figure, (axes,) = draw(4.6)
    for model, colour, marker in zip(("mar_base", "mar_large", "mar_huge"), (GREEN, VERMILION, BLUE), MARKERS):
        rows = [TABLE[model, method] for method in TABLE_METHODS]
        points = [row.speed_up for row in rows], [row.fid for row in rows]
        name = f"MAR-{MODEL_NAMES[model]}"
        axes.plot(*points, color=colour, marker=marker, mfc="white", label=f"{name}, LazyMAR's paper")
        if model in measured:
            axes.plot(
                *zip(*measured[model]),
                color=colour,
                marker=marker,
                ls="--",
                label=f"MAR-{MODEL_NAMES[model]}, measured here",
            )
    for method, colour, marker in zip(OTHER_METHODS, (PURPLE, BLACK, ORANGE), "X*P"):
        start, stop = method.speed_up
        label = f"{method.name}, MAR-H"
        if method.fid is not None:
            axes.plot(start, method.fid, color=colour, marker=marker, ms=12, ls="", label=label)
        elif start == stop:
            axes.axvline(start, color=colour, ls=":", label=f"{label}: up to here")
        else:
            axes.axvspan(start, stop, color=colour, alpha=0.18, lw=0, hatch="//", label=f"{label} (256 steps = 1)")
    axes.annotate("MAR", (1, 2.35), ha="center", va="bottom")
    axes.annotate("LazyMAR", (2.8, 2.48), ha="center", va="bottom")
    axes.set(xscale="log", xlim=(0.85, 11), ylim=(1.4, 2.6))
    axes.set(xlabel="Speed-up, as each paper states it", ylabel="FID (lower is better)")
    axes.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=1)
    return figure


@in_style
def small_model_quality_and_speed(baseline: Comparison, ablations: Mapping[str, Sequence[Comparison]]) -> Figure:
    """FID over speed-up of the settings of the ablations, by each ablation's title."""
    figure, (axes,) = draw(5.0)
    fid, error = baseline.fid
    axes.axhspan(fid - error, fid + error, color="#eeeeee", lw=0)
    axes.axhline(fid, color=BLACK, lw=1, ls=":")
    axes.plot(1, fid, color=BLACK, marker="*", ms=13, ls="", label="Baseline")
    for (title, settings), colour, marker in zip(ablations.items(), COLOURS, MARKERS):
        fids = np.array([setting.fid for setting in settings])
        speed_ups = [setting.speed_up(baseline) for setting in settings]
        axes.errorbar(speed_ups, fids[:, 0], fids[:, 1], color=colour, marker=marker,
                      ls="", elinewidth=1, capsize=2, alpha=0.9, label=title)  # fmt: skip
    axes.set(xlabel="Speed-up of sampling, measured", ylabel="FID* (lower is better)")
    figure.legend(loc="outside lower center", ncols=1)
    return figure


@in_style
def frontier(measured: Mapping[str, FrontierPoint], model: str) -> Figure:
    """FID of the embedded model, `model`, over seconds and over FLOPs, and below them MAR-H's as published.

    A line joins the methods of which none is both faster and better.
    """
    figure, panels = draw(10.6, 3)
    seconds, flops, published = panels
    points: dict[Axes, list[tuple[float, float]]] = {seconds: [], flops: []}
    for number, (name, point) in enumerate(measured.items()):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[(number + number // len(MARKERS)) % len(COLOURS)]
        if point.scores is None or point.evaluation is None:
            continue
        costs = {seconds: point.evaluation.sampling_seconds, flops: point.costs[model].flops.total / 1e9}
        for axes, cost in costs.items():
            if cost:
                fid, error = point.scores.fid
                points[axes].append((cost, fid))
                axes.errorbar(cost, fid, error, color=colour, marker=marker, ls="", elinewidth=1, capsize=2,
                              mec=BLACK, mew=0.6, label=name if axes is flops else None)  # fmt: skip
    for axes in points:
        draw_pareto_set(axes, points[axes])
        axes.set(xscale="log", ylabel="FID* (lower is better)")
    seconds.set(title="mar_tiny, measured", xlabel="Seconds of sampling per image")
    flops.set(title="mar_tiny, counted", xlabel="GFLOPs per image")
    draw_pareto_set(published, [(row.tflops, row.fid) for row in GTR_TABLE])
    for row in GTR_TABLE:
        published.plot(row.tflops, row.fid, color="white", mec=BLACK, marker="o", ls="")
        offset, alignment = (-9, "right") if row.tflops > 40 else (9, "left")
        published.annotate(row.name, (row.tflops, row.fid), (offset, 0), textcoords="offset points", ha=alignment,
                           va="center")  # fmt: skip
    published.set(title="MAR-H on ImageNet, GtR's table", xscale="log", xlim=(13, 85), ylim=(1.4, 3.5))
    published.set(xlabel="TFLOPs per image", ylabel="FID (lower is better)")
    for axes in panels:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def pareto_set(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those points (cost, FID) of which no other is at most as dear and better, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, fid in sorted(points):
        if not best or fid < best[-1][1]:
            best.append((cost, fid))
    return best


def draw_pareto_set(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Join the Pareto set by a line, behind the markers."""
    if best := pareto_set(points):
        axes.plot(*zip(*best), color=BLACK, lw=1.2, ls="--", zorder=1)


@in_style
def ablation(title: str, settings: Sequence[Comparison], baseline: Comparison, paper_label: str) -> Figure:
    """Distance to the baseline's images, FID and speed-up of each setting; `paper_label` is the paper's setting."""
    figure, (distance, fid, cost) = draw(6.6, 3, sharex=True)
    x = np.arange(len(settings))
    ordered = all(setting.label.replace(".", "").isdigit() for setting in settings)
    for axes, measured in ((distance, [setting.pixel_distance for setting in settings]),
                           (fid, [setting.fid_difference for setting in settings])):  # fmt: skip
        values, errors = zip(*measured)
        axes.errorbar(x, values, errors, color=BLUE, marker="o", capsize=4, ls="-" if ordered else "")
        axes.margins(x=0.08, y=0.2)
    fid.axhline(0, color=BLACK, lw=1, ls=":")
    distance.set_ylim(0, 1.2 * max(setting.pixel_distance.value for setting in settings))
    speed_ups = [setting.speed_up(baseline) for setting in settings]
    bars = cost.bar(x, speed_ups, color=SKY, edgecolor=BLACK, lw=0.8, width=0.6)
    cost.bar_label(bars, [f"{speed_up:.1f}" for speed_up in speed_ups], padding=2)
    cost.margins(y=0.18)
    labels = [f"{setting.label}\n(paper)" if setting.label == paper_label else setting.label for setting in settings]
    cost.set_xticks(x, labels)
    cost.set_xlabel(title)
    distance.set_title("Distance to the baseline's images, of 255")
    fid.set_title("FID* minus the baseline's")
    cost.set_title("Speed-up of sampling")
    return figure


@in_style
def similarity_by_step(redundancy: Redundancy) -> Figure:
    """Distance of rows from themselves at the step before, by step: 1 - cosine similarity."""
    figure, panels = draw(6.4, 2, sharex=True)
    titles = (f"Values of decoder block {redundancy.layer}", "Last decoder block's output")
    for axes, title, groups in zip(panels, titles, (redundancy.values, redundancy.output)):
        for (group, band), colour, line in zip(groups.items(), (VERMILION, GREEN, BLUE), ("-", "--", "-.")):
            low, mean, high = (
                np.maximum(1 - np.array(similarity), LEAST_CHANGE) for similarity in (band.high, band.mean, band.low)
            )
            axes.fill_between(redundancy.steps, low, high, color=colour, alpha=0.18, lw=0)
            label = "All other rows" if group.startswith("all") else f"Tokens {group}"
            axes.plot(redundancy.steps, mean, color=colour, ls=line, label=label if axes is panels[0] else None)
        axes.set(title=title, ylabel="1 − cosine similarity", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("Step, compared with the one before")
    figure.legend(loc="outside lower center", ncols=1)
    return figure


@in_style
def guidance_by_distance(redundancy: Redundancy) -> Figure:
    """Change of the difference between the branches by the distance of steps, and the error of reusing it."""
    figure, panels = draw(8.2, 3, sharex=True)
    lines = [
        (panels[0], redundancy.similarity, VERMILION, None),
        (panels[1], redundancy.change, VERMILION, None),
        (panels[2], redundancy.error_difference, VERMILION, "Difference reused"),
        (panels[2], redundancy.error_output, BLUE, "Output itself reused"),
    ]
    for axes, band, colour, label in lines:
        axes.fill_between(redundancy.distances, band.low, band.high, color=colour, alpha=0.15, lw=0)
        marker = "o" if colour == VERMILION else "s"
        axes.plot(redundancy.distances, band.mean, color=colour, marker=marker, label=label)
    panels[0].set_title("Difference: cosine similarity")
    panels[1].set_title("Difference: relative change")
    panels[2].set_title("Error of the unconditional branch")
    for axes in panels[1:]:
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("Steps apart")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@in_style
def rows_by_step(plans: Mapping[str, Plan], buffer_size: int, seq_len: int) -> Figure:
    """The rows that encoder and decoder compute at each step of each plan, by its name.

    The decoder's are those of the blocks behind the prune layer. Which of its rows are the least similar depends on the
    image, so all that may be are drawn in one shade: the darker, the more of them are computed.
    """
    figure, grid = plt.subplots(len(plans), 2, figsize=(WIDTH, 1.1 + 2.1 * len(plans)), sharex=True, sharey=True)
    for (name, plan), row in zip(plans.items(), grid):
        # By row and step: the share of such rows that is computed; nan where there is no such row yet.
        encoder, decoder = np.full((2, buffer_size + seq_len, len(plan)), np.nan)
        for step in plan:
            newest, known, stop = (buffer_size + count for count in (step.previous, step.start, step.stop))
            encoder[:known, step.index] = 1 if step.refresh else 0
            encoder[:buffer_size, step.index] = encoder[newest:known, step.index] = 1
            always = stop - newest
            decoder[:, step.index] = (step.num_kept - always) / (len(decoder) - always)
            decoder[newest:stop, step.index] = 1
        for axes, part, shares in zip(row, ("encoder", "decoder"), (encoder, decoder)):
            axes.imshow(shade(shares), aspect="auto", interpolation="nearest",
                        extent=(-0.5, len(plan) - 0.5, len(shares), 0))  # fmt: skip
            axes.axhline(buffer_size, color=BLACK, lw=0.8, ls=":")
            axes.set_title(f"{name}, {part}")
            axes.set_yticks([buffer_size / 2, buffer_size + seq_len / 2], ["class", "tokens"], rotation=90, va="center")
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False)
    for axes in grid[-1]:
        axes.set_xlabel("Step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shades = {"computed": 1, "some of these computed": 0.35, "reused": 0, "not known yet": np.nan}
    patches = [Patch(fc=shade(share), ec=BLACK, lw=0.5, label=label) for label, share in shades.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)
    return figure


def shade(shares: np.ndarray | float) -> np.ndarray:
    """RGB colours [..., 3] from `REUSED` for a share of 0 to `BLUE` for 1; white for nan."""
    shares = np.asarray(shares, float)[..., None]
    colours = shares * np.array(to_rgb(BLUE)) + (1 - shares) * np.array(to_rgb(REUSED))
    return np.where(np.isnan(shares), 1.0, colours)


@in_style
def flops_by_part(rows: Mapping[str, Flops], baselines: Mapping[str, float]) -> Figure:
    """Stacked bars per row (by name), in per cent of its baseline's total FLOPs."""
    figure, (axes,) = draw(0.8 + 0.48 * len(rows))
    y = np.arange(len(rows))
    left = np.zeros(len(rows))
    for part in Flops._fields:
        widths = np.array([100 * getattr(flops, part) / baselines[name] for name, flops in rows.items()])
        axes.barh(y, widths, left=left, color=PART_COLOURS[part], hatch=HATCHES[part], edgecolor="white", lw=0.5,
                  label=part, height=0.7)  # fmt: skip
        left += widths
    for position, (flops, end) in enumerate(zip(rows.values(), left)):
        axes.text(end + 1, position, f"{flops.total / 1e12:.3g} T", va="center")
    axes.set_yticks(y, list(rows))
    axes.invert_yaxis()
    axes.set(xlim=(0, 122), xlabel="FLOPs per image, % of the baseline's")
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@in_style
def flops_by_step(methods: Mapping[str, Sequence[Flops]]) -> Figure:
    """Stacked bars per step, a panel for each method by name."""
    figure, panels = draw(5.6, len(methods), sharex=True, sharey=True)
    for axes, (name, steps) in zip(panels, methods.items()):
        bottom = np.zeros(len(steps))
        for part in Flops._fields:
            heights = np.array([getattr(step, part) for step in steps]) / 1e9
            axes.bar(np.arange(len(steps)), heights, 0.85, bottom, color=PART_COLOURS[part],
                     label=part if axes is panels[0] else None)  # fmt: skip
            bottom += heights
        axes.set(title=f"{name}: {bottom.sum() / 1e3:.3g} TFLOPs", ylabel="GFLOPs")
        axes.grid(axis="x", visible=False)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("Step")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@in_style
def image_pairs(baseline: Path, other: Path, count: int, per_row: int = 5) -> Figure:
    """The first images of two runs of the same seeds, and the difference: mid-grey is none."""
    names = [f"{index:06d}.png" for index in range(count)]
    blocks = [names[start : start + per_row] for start in range(0, count, per_row)]
    figure, grid = plt.subplots(
        3 * len(blocks), per_row, figsize=(WIDTH, 0.95 * 3 * len(blocks) * 5 / per_row), squeeze=False
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    for block, row in zip(blocks, grid.reshape(len(blocks), 3, per_row)):
        for column, name in enumerate(block):
            first, second = (np.asarray(Image.open(folder / name).convert("RGB")) for folder in (baseline, other))
            difference = 127.5 + second - first.astype(float)
            for axes, pixels in zip(row[:, column], (first, second, difference.clip(0, 255).astype(np.uint8))):
                axes.imshow(pixels, interpolation="nearest")
        for axes, label in zip(row[:, 0], ("Baseline", "LazyMAR", "Difference")):
            axes.set_ylabel(label)
    return figure
