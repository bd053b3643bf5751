"""The page's figures as PNG files: one column wide, legible on a phone, and readable without colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from models import Plan
from util.condition_errors import REUSED, ROW_GROUPS
from util.report.results import Comparison, Row

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"
SHADES = LinearSegmentedColormap.from_list("share of rows that is computed", ["#e3e3e3", COLOURS[0]])
WIDTH, DPI = 5.0, 200  # inches and dots per inch: 1000 pixels, which a phone shows at about a third
STYLE: dict[Any, Any] = {
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def panels(height: float, rows: int, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Make a figure of a height in inches, and its panels [rows, columns], whatever the user's own style is."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: Figure, explained: Axes | None = None) -> bytes:
    """Return a figure's PNG file, with a legend of `explained` below the panels."""
    file = io.BytesIO()
    if explained is not None:
        figure.legend(*explained.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def frontier(compared: Mapping[str, tuple[Row, Comparison]]) -> bytes:
    """Draw FID of mar_tiny over seconds and over FLOPs, by method.

    A dashed line joins the methods that no other method beats in both.
    """
    figure, [[by_seconds], [by_flops]] = panels(7.6, 2)
    for axes, costs in (
        (by_seconds, [row.seconds for row, _ in compared.values()]),
        (by_flops, [row.flops / 1e9 for row, _ in compared.values()]),
    ):
        points = [(cost, comparison.fid.value) for cost, (_, comparison) in zip(costs, compared.values())]
        for number, (name, (_, comparison)) in enumerate(compared.items()):
            colour = COLOURS[(number + number // len(MARKERS)) % len(COLOURS)]
            look = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "mec": "black", "ls": ""}
            axes.errorbar(costs[number], *comparison.fid, label=name, capsize=2, **look)
        cost, fid = np.array(sorted(points)).T
        best = fid == np.minimum.accumulate(fid)
        axes.plot(cost[best], fid[best], color="black", lw=1.2, ls="--", zorder=1)
        axes.set(xscale="log", ylabel="FID* (lower is better)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    by_seconds.set(title="mar_tiny, measured", xlabel="Seconds of sampling per image")
    by_flops.set(title="mar_tiny, by formula", xlabel="GFLOPs per image")
    return png(figure, by_flops)


def draw_lines(axes: Axes, lines: Mapping[str, Sequence[float]], first: int = 0, **texts: Any) -> None:
    """Draw lines by their labels; their points are numbered from `first` on."""
    for (label, line), colour, marker in zip(lines.items(), COLOURS, MARKERS):
        axes.plot(range(first, first + len(line)), line, color=colour, marker=marker, ms=4, label=label)
    axes.set(**texts)


def redundancy(found: Mapping[str, Any]) -> bytes:
    """Draw how much rows change from step to step, and the error of reusing one branch of guidance, by distance."""
    figure, [[change], [error]] = panels(7.6, 2)
    lines = dict(zip(ROW_GROUPS, zip(*found["change"])))
    draw_lines(change, lines, 1, title="Values of the prune layer", ylabel="1 − cosine similarity")
    change.set(yscale="log", xlabel="Step, compared with the step before")
    lines = dict(zip(REUSED, zip(*found["errors"])))
    draw_lines(error, lines, 1, title="Unconditional branch", ylabel="Relative error")
    error.set(ylim=(0, None), xlabel="Steps since it was computed")
    for axes in (change, error):
        axes.legend(fontsize=9, frameon=True)
    return png(figure)


def errors_by_step(found: Mapping[str, Any]) -> bytes:
    """Draw the errors of the conditions by step, by policy; see `util.condition_errors`."""
    figure, [[conditional], [guidance]] = panels(7.6, 2, sharex=True)
    for number, (axes, title) in enumerate(((conditional, "Conditional branch"), (guidance, "Guidance direction"))):
        for step in next(iter(found.values()))["refresh_steps"]:
            axes.axvline(step, color="#bbbbbb", lw=0.8, ls=":")
        lines = {label: policy["by_step"][number] for label, policy in found.items()}
        draw_lines(axes, lines, title=title, ylabel="Relative error", ylim=(0, None))
    guidance.set(xlabel="Step")
    return png(figure, guidance)


def rows_by_step(plans: Mapping[str, Plan], buffer_size: int) -> bytes:
    """Draw the rows that encoder and decoder compute at each step of each plan.

    The decoder's are those of the blocks after the prune layer. Which of its rows are the least similar depends on the
    image, so all rows that may be are drawn in one shade: the darker, the more of them are computed.
    """
    figure, grid = panels(1.1 + 2.1 * len(plans), len(plans), 2, sharex=True, sharey=True)
    for (name, plan), row in zip(plans.items(), grid):
        encoder, decoder = np.full((2, plan.num_rows, len(plan)), np.nan)  # share computed; nan: no such row yet
        for step in plan:
            newest, known, stop = (buffer_size + count for count in (step.previous_start, step.start, step.stop))
            encoder[:known, step.index] = 1 if step.refresh else 0
            encoder[:buffer_size, step.index] = encoder[newest:known, step.index] = 1
            in_hand = stop - newest
            decoder[:, step.index] = (step.num_recomputed - in_hand) / (plan.num_rows - in_hand)
            decoder[newest:stop, step.index] = 1
        for axes, part, shares in zip(row, ("encoder", "decoder"), (encoder, decoder)):
            axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.axhline(buffer_size, color="black", lw=0.8, ls=":")
            middles = [buffer_size / 2, (buffer_size + plan.num_rows) / 2]
            axes.set_yticks(middles, ["class", "tokens"], rotation=90, va="center")
            axes.set(title=f"{name}, {part}", xlabel="Step")
            axes.grid(visible=False)
            axes.label_outer()
    shades = {"computed": SHADES(1.0), "some of these computed": SHADES(0.35), "reused": SHADES(0.0)}
    shades["not known yet"] = (1.0, 1.0, 1.0, 1.0)
    patches = [Patch(fc=colour, ec="black", lw=0.5, label=label) for label, colour in shades.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)
    return png(figure)
