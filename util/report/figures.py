"""The page's figures as PNG files: one column wide, legible on a phone, and readable without colour."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from models import Plan
from util.condition_errors import REUSED, ROW_GROUPS
from util.report.results import Row

# Colours that people with any colour vision can tell apart (Tableau's), each with a marker of its own.
COLOURS = matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
SHADES = LinearSegmentedColormap.from_list("share of rows that is computed", ["#e3e3e3", COLOURS[0]])
WIDTH, DPI = 5.0, 200  # inches and dots per inch: 1000 pixels, which a phone shows at about a third
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS, marker=list("osD^vP*X<>")),
    "lines.markersize": 4,
    "font.size": 11.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
}


def panels(height: float, rows: int, columns: int = 1, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """Make a figure of a height in inches, and its panels, whatever the user's own style is."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def png(figure: Figure) -> bytes:
    """Return a figure's PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def frontier(compared: Mapping[str, tuple[Row, Mapping[str, Any]]]) -> bytes:
    """Draw FID of mar_tiny over seconds and over FLOPs, by method.

    A dashed line joins the methods that no other method beats in both.
    """
    figure, (by_seconds, by_flops) = panels(7.6, 2)
    for axes, cost in ((by_seconds, lambda row: row.seconds), (by_flops, lambda row: row.flops / 1e9)):
        for name, (row, scores) in compared.items():
            axes.errorbar(cost(row), *scores["fid"], label=name, capsize=2, mec="black", ms=7, ls="")
        costs, fid = np.array(sorted((cost(row), scores["fid"].value) for row, scores in compared.values())).T
        best = fid == np.minimum.accumulate(fid)
        axes.plot(costs[best], fid[best], color="black", marker="", ls="--", zorder=1)
        axes.set(ylabel="FID* (lower is better)")
    by_seconds.set(title="mar_tiny, measured", xlabel="Seconds of sampling per image")
    by_flops.set(title="mar_tiny, by formula", xlabel="GFLOPs per image")
    figure.legend(*by_flops.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return png(figure)


def draw_lines(axes: Axes, lines: Mapping[str, Sequence[float]], first: int = 0, **settings: Any) -> None:
    """Draw lines by their labels; their points are numbered from `first` on."""
    for label, line in lines.items():
        axes.plot(range(first, first + len(line)), line, label=label)
    axes.set(**settings)
    axes.legend(fontsize=9)


def redundancy(found: Mapping[str, Any]) -> bytes:
    """Draw how much rows change from step to step, and the error of reusing one branch of guidance, by distance."""
    figure, (change, error) = panels(7.6, 2)
    lines = dict(zip(ROW_GROUPS, zip(*found["change"])))
    draw_lines(change, lines, 1, title="Values of the prune layer", ylabel="1 − cosine similarity", yscale="log")
    change.set_xlabel("Step, compared with the step before")
    lines = dict(zip(REUSED, zip(*found["errors"])))
    draw_lines(error, lines, 1, title="Unconditional branch", ylabel="Relative error", ylim=(0, None))
    error.set_xlabel("Steps since it was computed")
    return png(figure)


def errors_by_step(found: Mapping[str, Any]) -> bytes:
    """Draw the errors of the conditions by step, by policy; see `util.condition_errors`."""
    figure, grid = panels(7.6, 2)
    for number, title in enumerate(("Conditional branch", "Guidance direction")):
        lines = {label: policy["by_step"][number] for label, policy in found.items()}
        for step in next(iter(found.values()))["refreshes"]:
            grid[number].axvline(step, color="#bbbbbb", lw=0.8, ls=":", marker="")
        draw_lines(grid[number], lines, title=title, xlabel="Step", ylabel="Relative error")
    return png(figure)


def rows_by_step(plan: Plan) -> bytes:
    """Draw the rows that encoder and decoder compute at each step.

    The decoder's are those of the blocks after the prune layer. Which of its rows are the least similar depends on the
    image, so all rows that may be are drawn in one shade: the darker, the more of them are computed.
    """
    buffer_size = plan.num_rows - plan.schedule.seq_len
    encoder, decoder = np.full((2, plan.num_rows, len(plan)), np.nan)  # share computed; nan: no such row yet
    for step in plan:
        newest, known, stop = (buffer_size + count for count in (step.previous_start, step.start, step.stop))
        encoder[:known, step.index] = 1 if step.refresh else 0
        encoder[:buffer_size, step.index] = encoder[newest:known, step.index] = 1
        always = stop - newest  # recomputed, however similar
        decoder[:, step.index] = (step.num_recomputed - always) / (plan.num_rows - always)
        decoder[newest:stop, step.index] = 1
    figure, grid = panels(3.6, 1, 2, sharey=True)
    for axes, title, shares in zip(grid, ("Encoder rows", "Decoder rows"), (encoder, decoder)):
        axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.axhline(buffer_size, color="black", lw=0.8, ls=":", marker="")
        axes.set(title=title, xlabel="Step")
        axes.grid(visible=False)
    grid[0].set_yticks(
        [buffer_size / 2, (buffer_size + plan.num_rows) / 2], ["class", "tokens"], rotation=90, va="center"
    )
    shades = {"computed": SHADES(1.0), "some of these computed": SHADES(0.35), "reused": SHADES(0.0)}
    shades["not known yet"] = (1.0, 1.0, 1.0, 1.0)
    patches = [Patch(fc=colour, ec="black", lw=0.5, label=label) for label, colour in shades.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2)
    return png(figure)
