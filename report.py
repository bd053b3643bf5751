"""Make a page of what `reproduce.py` has measured: tables, figures and images in one file that needs no network.

python report.py                                  # output/reproduce/report.html, and its PNGs beside it
python report.py --results output/reproduce --output report.html
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from models import PRESETS, CachePolicy
from models.lazymar.flops import Flops
from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write
from util.report import figures
from util.report.figures import MODEL_NAMES, Point
from util.reproduction.ablations import ABLATED_MODEL, ABLATIONS, run_name
from util.reproduction.jackknife import difference
from util.reproduction.paper import LAZYMAR, MAR, OTHER_METHODS, PARAMETERS, TABLE, PaperRow
from util.reproduction.results import Results
from util.runs.options import Options

METHODS = {"baseline": "MAR", "lazymar": "LazyMAR"}
PAPER_IMAGES = 50_000
PAIRS = 10
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; color: #111; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto; }
figcaption { font-size: .92rem; margin-top: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .35rem .5rem .35rem 0; text-align: left; vertical-align: top; }
td small { display: block; color: #444; line-height: 1.3; }
.notes td { padding-left: 1rem; border-bottom: 2px solid #888; font-size: .85rem; color: #222; }
.values td { border-bottom: 0; }
.warning { border-left: .3rem solid #D55E00; background: #fdf3ec; padding: .6rem .9rem; }
.mark { font-weight: 700; color: #9c4300; }
.scroll { overflow-x: auto; }
@media (max-width: 40rem) {
  .cards thead { position: absolute; left: -99rem; }
  .cards tr, .cards td { display: block; border: 0; padding: .1rem 0; }
  .cards td::before { content: attr(data-label); float: left; width: 6.5rem; color: #444; }
  .cards td small { margin-left: 6.5rem; }
  .cards td:first-child { font-size: 1rem; padding-top: .8rem; }
  .cards td:first-child::before, .cards .notes td::before { content: none; }
  .cards .notes td { padding-bottom: .6rem; border-bottom: 1px solid #ccc; }
}
@media print {
  body { max-width: none; font-size: 10.5pt; } figure img { max-width: 13cm; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } .scroll { overflow: visible; } a { color: inherit; }
}
"""


@dataclass(frozen=True)
class Picture:
    """A figure of the page; `caption` is HTML."""

    name: str
    png: bytes
    alt: str
    caption: str

    def html(self) -> str:
        source = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        alt = html.escape(self.alt, quote=True)
        return f'<figure><img src="{source}" alt="{alt}"><figcaption>{self.caption}</figcaption></figure>'


@dataclass(frozen=True)
class Row:
    """A row of the table, from its result."""

    model: str
    method: str
    result: dict
    images_made: int  # files in the run's folder

    @property
    def name(self) -> str:
        prefix, size = METHODS[self.method], MODEL_NAMES[self.model]
        return f"{prefix}-{size}" if self.paper else f"{size}, {'baseline' if prefix == 'MAR' else prefix}"

    @property
    def paper(self) -> PaperRow | None:
        return TABLE.get((self.model, self.method))

    @property
    def run(self) -> dict:
        return self.result["run"] or {}

    @property
    def settings(self) -> dict:
        return self.result["inputs"]["settings"]

    def score(self, name: str) -> float | None:
        """ "fid" or "isc", whatever network they were measured with."""
        keys = {"fid": ("frechet_inception_distance", "fid_fashion_classifier"),
                "isc": ("inception_score_mean", "isc_fashion_classifier_mean")}  # fmt: skip
        return next((self.run[key] for key in keys[name] if self.run.get(key) is not None), None)

    @property
    def seconds(self) -> float | None:
        return self.run.get("seconds_per_image", (self.result["latency"] or {}).get("seconds"))

    @cached_property
    def flops(self) -> Flops:
        return Flops.of_steps(self.steps)

    @property
    def steps(self) -> list[Flops]:
        return [Flops(*step) for step in self.result["flops_per_step"]]

    def marks(self) -> list[str]:
        """What keeps this row from being a final figure of the paper's setting."""
        marks = []
        if self.result["unfinished"]:
            wanted = self.settings["num_images"]
            marks.append(f"PARTIAL: {self.images_made:,} of {wanted:,} images are made, and none scored; run again")
        elif self.result["missing"]:
            marks.append(f"NOT RUN: {self.result['missing']}")
            if self.result["latency"]:
                marks.append(f"RANDOM WEIGHTS: seconds are of {self.result['latency']['how']}")
        elif not self.run:
            marks.append("NOT RUN: not among --models; operations and parameters need no weights")
        if others := self.other_settings():
            marks.append(f"OTHER SETTINGS than the paper's: {'; '.join(others)}")
        return [*marks, *self.run.get("notes", ())]

    def other_settings(self) -> list[str]:
        """What differs from the paper's setting, in words."""
        defaults = Options(model=self.model)
        paper = {name: getattr(defaults, name) for name in ("num_iter", "num_sampling_steps", "cfg_schedule",
                                                             "temperature")}  # fmt: skip
        paper["cfg"] = PRESETS[self.model].cfg
        if self.run or self.result["unfinished"]:
            paper["num_images"] = PAPER_IMAGES
        if self.method == "lazymar":
            paper.update(json.loads(json.dumps(dataclasses.asdict(CachePolicy()))))
        own = {**self.settings, **self.settings["cache"]}
        return [f"{name} {own[name]} instead of {value}" for name, value in paper.items() if own.get(name) != value]


@dataclass(frozen=True)
class Report:
    """Everything that `reproduce.py` has left in a folder."""

    folder: Path
    results: dict[str, dict]
    damaged: list[str]

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Raises InputError if there is nothing to report on."""
        files, results, damaged = Results(folder / "results"), {}, []
        for name in files.names():
            try:
                results[name] = files.read(name)
            except InputError as error:
                damaged.append(str(error))
        if not results:
            raise InputError(damaged[0] if damaged else f"{files.folder} holds no results: run reproduce.py first")
        return cls(folder, results, damaged)

    @cached_property
    def rows(self) -> dict[tuple[str, str], Row]:
        """By model and method."""
        rows = {}
        for model in PRESETS:
            for method in METHODS:
                if result := self.results.get(f"{model}-{method}"):
                    made = len(list((self.folder / model / method / "images").glob("*.png")))
                    rows[model, method] = Row(model, method, result, made)
        return rows

    # Ablations

    @cached_property
    def reference(self) -> Point | None:
        """The baseline, on as many images as the ablations'."""
        result = self.results.get("ablation-baseline")
        return result and self.point(result, result)

    def ablations(self) -> Iterator[tuple[str, list[Point], list[str]]]:
        """(name, points, labels of settings that are not there) of each ablation of which something is there."""
        if self.reference is None:
            return
        baseline = self.results["ablation-baseline"]
        for name, kind in ABLATIONS.items():
            there, lacking = [], []
            for label in kind.policies:
                result = self.results.get(f"ablation-{run_name(name, label)}")
                if result and _comparable(result, baseline):
                    there.append(self.point(result, baseline))
                else:
                    lacking.append(label)
            if there:
                yield name, there, lacking

    @staticmethod
    def point(result: dict, baseline: dict) -> Point:
        return Point(
            label=result["label"],
            speed_up=baseline["sampling_seconds"] / result["sampling_seconds"],
            fid=tuple(result["fid"]),
            fid_difference=tuple(result["fid_difference"]),
            inception_score=tuple(result["inception_score"]),
            pixel_distance=tuple(result["pixel_distance"]),
            pixel_distance_by_group=tuple(result["pixel_distance_by_group"]),
            seconds=result["sampling_seconds"],
            tflops=result["flops_per_image"] / 1e12,
        )

    # The page

    def page(self) -> tuple[str, list[Picture]]:
        """The page, and the pictures on it."""
        sections = [
            ("", self.introduction()),
            ("The paper's table", self.table()),
            ("Quality against speed", self.quality_and_speed()),
            ("Same seeds, side by side", self.pairs()),
            ("Ablations", self.ablation_section()),
            ("Why it works", self.redundancy()),
            ("Where the operations go", self.operations()),
            ("How this was measured", self.conditions()),
        ]
        body, pictures = [], []
        for title, parts in sections:
            parts = list(parts)
            if title and parts:
                body.append(f"<h2>{title}</h2>")
            pictures += [part for part in parts if isinstance(part, Picture)]
            body += [part.html() if isinstance(part, Picture) else part for part in parts]
        # The policy makes sure that nothing is fetched.
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        head = (
            f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>LazyMAR, reproduced</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
        )
        document = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body)
        return f"{document}\n</body></html>\n", pictures

    def introduction(self) -> Iterator[str]:
        yield "<h1>LazyMAR, reproduced</h1>"
        yield (
            f"<p>LazyMAR ({cite(LAZYMAR)}) speeds up masked autoregressive image generation without training, by "
            "reusing what hardly changes from step to step. This page shows what was measured with this repository, "
            "beside what was published.</p>"
        )
        pair = [self.rows.get((ABLATED_MODEL, method)) for method in METHODS]
        if all(pair) and all(row.run for row in pair):
            before, after = pair
            yield (
                "<p>On the embedded model, mar_tiny (Fashion-MNIST), LazyMAR makes an image "
                f"<b>{before.seconds / after.seconds:.1f} times faster</b> with "
                f"{after.flops.total / before.flops.total:.0%} of the operations; FID* is "
                f"{number(before.score('fid'))} for the baseline ({before.run['num_images']:,} images) and "
                f"{number(after.score('fid'))} for LazyMAR ({after.run['num_images']:,} images).</p>"
            )
        unfinished = [row.name for row in self.rows.values() if row.result["unfinished"]]
        unfinished += [f"{ABLATIONS[name].title.lower()} {', '.join(lacking)}" for name, _, lacking in self.ablations()
                       if lacking]  # fmt: skip
        lost = [f"{model}-{method}" for model in PRESETS for method in METHODS if (model, method) not in self.rows]
        problems = [f"PARTIAL: not finished are {'; '.join(unfinished)}."] * bool(unfinished)
        problems += [f"PARTIAL: there is no result of {', '.join(lost)}."] * bool(lost) + self.damaged
        for problem in problems:
            yield f'<p class="warning">{html.escape(problem)}</p>'

    def table(self) -> Iterator[str]:
        labels = ("Model", "FID", "IS", "s per image", "TFLOPs", "Parameters", "Speed-up")
        yield '<table class="cards"><thead><tr>' + "".join(f"<th>{label}</th>" for label in labels) + "</tr></thead>"
        for row in self.rows.values():
            cells = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels, self.cells(row)))
            yield f'<tr class="values">{cells}</tr>'
            marks = "<br>".join(mark_up(mark) for mark in row.marks())
            yield f'<tr class="notes"><td colspan="{len(labels)}">{marks}</td></tr>'
        yield "</table>"
        yield (
            f"<p>Below each figure is the paper's ({cite(LAZYMAR)}; parameters: {cite(MAR)}) and the difference from "
            "it. Operations are counted by running the sampler on tensors without values: matrix products of linear "
            "layers and attention, two operations per multiply-add, one image with guidance, without the VAE; "
            "PyTorch's own counter gives the same. “Code” is the authors' code counted likewise: it also computes what "
            "no result depends on. What else is in the paper's figures is not published. The paper's speed-ups are "
            "ratios of operations; its GPU is an RTX 3090. * FID and IS of mar_tiny come from a Fashion-MNIST "
            "classifier instead of Inception, and compare with no others.</p>"
        )

    def cells(self, row: Row) -> Iterator[str]:
        paper, star = row.paper, "" if row.paper else "*"
        yield f"<b>{row.name}</b>"
        yield against(row.score("fid"), paper and paper.fid, 2, star)
        yield against(row.score("isc"), paper and paper.inception_score, 1 if paper else 2, star)
        seconds = "–" if row.seconds is None else f"<b>{row.seconds:.3g}</b>"
        yield seconds + (
            f"<small>paper {paper.gpu_seconds:.2f} GPU, {paper.cpu_seconds:.1f} CPU</small>" if paper else ""
        )
        tflops = f"<b>{row.flops.total / 1e12:.4g}</b>"
        for name, value in (("paper", paper and paper.tflops), ("code", paper and paper.counted_tflops)):
            if value:
                tflops += f"<small>{name} {value:.2f} ({row.flops.total / 1e12 / value - 1:+.1%})</small>"
        yield tflops
        published = f"<small>paper {PARAMETERS[row.model] / 1e6:.0f} M</small>" if paper else ""
        yield f"<b>{row.result['parameters'] / 1e6:.4g} M</b>{published}"
        baseline = self.rows.get((row.model, "baseline"))
        if baseline is None:
            yield "–"
            return
        speed_up = f"<b>{baseline.flops.total / row.flops.total:.2f}×</b> operations"
        if row.seconds and baseline.seconds and bool(row.run) == bool(baseline.run):
            speed_up += f"<small><b>{baseline.seconds / row.seconds:.2f}×</b> time</small>"
        yield speed_up + (f"<small>paper {paper.speed_up:.2f}</small>" if paper else "")

    def quality_and_speed(self) -> Iterator[Picture]:
        measured = {}
        for model in ("mar_base", "mar_large", "mar_huge"):
            pair = [self.rows.get((model, method)) for method in METHODS]
            if all(row and row.run and row.score("fid") for row in pair):
                measured[model] = {
                    row.method: (pair[0].flops.total / row.flops.total, row.score("fid")) for row in pair
                }
        own = (
            "The models that were evaluated here are dashed."
            if measured
            else "None of these was evaluated here: all are the papers' figures."
        )
        others = "; ".join(f"{method.name} ({cite(method.source)}): {method.note}" for method in OTHER_METHODS)
        yield Picture(
            "quality_and_speed",
            figures.quality_and_speed(measured),
            "FID against speed-up of MAR and LazyMAR at three sizes, and of GtR, MARché and DiSA",
            f"<b>ImageNet, published.</b> MAR (at 1) and LazyMAR ({cite(LAZYMAR)}), and other training-free methods "
            f"for MAR-H as their papers state them: {others}. Where no FID is given here, a line or a band stands at "
            f"the speed-up alone. {own}",
        )
        if self.reference:
            points = {ABLATIONS[name].title: points for name, points, _ in self.ablations()}
            result = self.results["ablation-baseline"]
            yield Picture(
                "small_model",
                figures.small_model_quality_and_speed(self.reference, points),
                "FID of mar_tiny against the measured speed-up for every setting of the ablations",
                f"<b>mar_tiny, measured.</b> Every setting of the ablations, on {result['num_images']} images of the "
                "same seeds. Bars, and the grey band of the baseline, are standard errors; as the images are paired, a "
                "difference of two may be surer than the bars suggest (see the table of ablations).",
            )

    def pairs(self) -> Iterator[str | Picture]:
        for model in PRESETS:
            folders = [self.folder / model / method / "images" for method in METHODS]
            there = [all((folder / f"{index:06d}.png").exists() for folder in folders) for index in range(PAIRS)]
            count = there.index(False) if False in there else PAIRS
            seeds = {self.rows[model, method].settings["seed"] for method in METHODS if (model, method) in self.rows}
            if count < 2 or len(seeds) != 1:
                continue
            yield Picture(
                f"pairs_{model}",
                figures.image_pairs(*folders, count),
                f"Images of {model} by the baseline and by LazyMAR from the same seeds, and their difference",
                f"<b>{model}:</b> the first {count} images of seed {seeds.pop()}, not chosen; classes 0 to "
                f"{count - 1}. Difference: LazyMAR's minus the baseline's; mid-grey is none.",
            )

    def ablation_section(self) -> Iterator[str | Picture]:
        if self.reference is None:
            yield "<p>None has been measured.</p>"
            return
        result = self.results["ablation-baseline"]
        yield (
            f"<p>mar_tiny, one setting of LazyMAR varied at a time, {result['num_images']} images of the same seeds "
            "throughout. The distance is the mean absolute difference of a pixel from the baseline's image of the same "
            "seed: it is far less noisy than FID. In brackets: how much it is above the distance at the paper's value, "
            "over the same images. ± is the standard error by the jackknife over "
            f"{len(result['pixel_distance_by_group'])} groups of images. Each image has a seed of its own, so this is "
            "the spread over seeds; of a difference it is smaller, because the images are paired.</p>"
        )
        if result["notes"]:
            yield f'<p class="warning">{html.escape(" ".join(result["notes"]))}</p>'
        lines = []
        for name, points, lacking in self.ablations():
            kind = ABLATIONS[name]
            chosen = next(label for label, policy in kind.policies.items() if policy == kind.base)
            base = next((point for point in points if point.label == chosen), None)
            partial = f' <span class="mark">PARTIAL: {", ".join(lacking)} not measured.</span>' if lacking else ""
            yield Picture(
                f"ablation_{name}",
                figures.ablation(kind.title, points, chosen),
                f"Distance to the baseline's images, FID against the baseline's, and speed-up by {kind.title.lower()}",
                f"<b>{kind.title}.</b> {kind.note} {summary(points, base)}{partial}",
            )
            lines += [f"<tr><th colspan=7>{html.escape(kind.title)}</th></tr>"]
            lines += [ablation_line(point.label + " (paper)" * (point is base), point, base) for point in points]
        heads = ("", "Distance", "FID* − baseline's", "FID*", "IS*", "s per image", "TFLOPs")
        header = "".join(f"<th>{head}</th>" for head in heads)
        baseline = ablation_line("Baseline", self.reference)
        yield f'<div class="scroll"><table><tr>{header}</tr>{baseline}{"".join(lines)}</table></div>'

    def redundancy(self) -> Iterator[Picture]:
        for model in PRESETS:
            result = self.results.get(f"{model}-redundancy")
            if result is None:
                continue
            where = (
                f"{model}, baseline, {result['num_images']} images. Lines: means; bands: the middle 80 % of the rows."
            )
            means = {group: mean(band["mean"]) for group, band in result["values"].items()}
            found = ", ".join(f"{value:.3f} ({group})" for group, value in means.items())
            yield Picture(
                f"similarity_{model}",
                figures.similarity_by_step(result),
                "Change of token features between adjacent steps, for three groups of rows",
                "<b>What the token cache lives on.</b> How far the features of a row are from its own at the step "
                f"before; lower is more alike. Mean cosine similarity of the values: {found}. LazyMAR computes the "
                f"least similar rows afresh, besides those predicted at this step and at the step before. {where}",
            )
            change = result["difference"]["change"]["mean"]
            error = {kind: band["mean"] for kind, band in result["error"].items()}
            yield Picture(
                f"guidance_{model}",
                figures.guidance_by_distance(result),
                "Similarity of the difference between the halves at different steps, by their distance",
                "<b>What the condition cache lives on.</b> The difference between the unconditional and the "
                "conditional output of the last decoder block, at the rows predicted at the later step. One step apart "
                f"it changes by {change[0]:.0%} of its norm, {result['distances'][-1]} steps apart by "
                f"{change[-1]:.0%}. What counts is the unconditional half that comes out: added to the conditional "
                f"half, the difference of {result['distances'][-1]} steps ago misses it by "
                f"{error['difference reused'][-1]:.1%} of its norm; the unconditional half of that step misses it by "
                f"{error['output reused'][-1]:.1%}. {where}",
            )

    def operations(self) -> Iterator[Picture]:
        baselines = {model: row.flops.total for (model, method), row in self.rows.items() if method == "baseline"}
        rows = {row.name: row for row in self.rows.values() if row.model in baselines}
        if rows:
            yield Picture(
                "operations_by_part",
                figures.operations_by_part({name: row.flops for name, row in rows.items()},
                                           {name: baselines[row.model] for name, row in rows.items()}),
                "Operations per image of each model by encoder, decoder and head, as shares of the baseline's",
                "<b>By part.</b> Counted operations per image, with guidance, without the VAE.",
            )  # fmt: skip
        for model in ("mar_huge", ABLATED_MODEL):
            pair = {
                METHODS[method]: self.rows[model, method].steps for method in METHODS if (model, method) in self.rows
            }
            if len(pair) == 2:
                yield Picture(
                    f"operations_by_step_{model}",
                    figures.operations_by_step(pair),
                    f"Operations of {model} at each step, by part, baseline above LazyMAR",
                    f"<b>By step, {model}.</b> LazyMAR's refreshes are the steps that stand out. The head's share "
                    "grows with the tokens that a step predicts.",
                )

    def conditions(self) -> Iterator[str]:
        lines = {}
        for name, result in self.results.items():
            environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
            dtype = result["inputs"]["settings"]["dtype"]
            line = f"{result['device']}, {dtype}, {result['processes']} process(es); {environment}"
            lines.setdefault(line, []).append((result["date"], name))
        yield "<ul>"
        for line, measured in lines.items():
            first, last = min(measured)[0], max(measured)[0]
            what = f"{len(measured)} results" if len(measured) > 4 else ", ".join(name for _, name in measured)
            when = first if first == last else f"{first} to {last}"
            yield f"<li>{html.escape(what)}, {when}: {html.escape(line)}</li>"
        yield "</ul>"
        yield "<p>Seconds per image are those of one process; several processes make as many images at a time.</p>"


def _comparable(result: dict, baseline: dict) -> bool:
    """Whether a result is of as many images, and of the same settings but for the policy."""

    def relevant(inputs: dict) -> dict:
        settings = {
            name: value for name, value in inputs["settings"].items() if name not in ("cache", "lazy_mar", "num_images")
        }
        return {**inputs, "settings": settings}

    return relevant(result["inputs"]) == relevant(baseline["inputs"])


# Words and numbers


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def against(own: float | None, paper: float | None, digits: int, star: str) -> str:
    """A figure, the paper's below it, and the difference."""
    text = f"<b>{number(own, digits)}</b>{star if own is not None else ''}"
    if paper is not None:
        difference = f" ({own - paper:+.{digits}f})" if own is not None else ""
        text += f"<small>paper {paper:.{digits}f}{difference}</small>"
    return text


def spread(pair: Sequence[float], digits: int, sign: str = "") -> str:
    value, error = pair
    return number(value, digits, sign) + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def distances(point: Point, base: Point | None, digits: int) -> str:
    """The distance to the baseline's images and, in brackets, how much it is above that of the `base` setting."""
    text = spread(point.pixel_distance, digits)
    if base in (None, point):
        return text
    more = difference(point.pixel_distance_by_group, base.pixel_distance_by_group)
    return f"{text} ({spread(more, 2, sign='+')})"


def ablation_line(label: str, point: Point, base: Point | None = None) -> str:
    cells = [
        html.escape(label),
        distances(point, base, 2),
        spread(point.fid_difference, 2),
        spread(point.fid, 2),
        spread(point.inception_score, 2),
        f"{point.seconds:.3f} ({point.speed_up:.1f}×)",
        f"{point.tflops:.3f}",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def summary(points: Sequence[Point], base: Point | None) -> str:
    """The distances in words."""
    return (
        "Distance: " + "; ".join(f"{html.escape(point.label)}: {distances(point, base, 1)}" for point in points) + "."
    )


def mark_up(mark: str) -> str:
    """A row's mark, its words in capitals standing out."""
    head, colon, rest = mark.partition(":")
    if colon and head[:4].isupper():
        return f'<span class="mark">{html.escape(head)}:</span>{html.escape(rest)}'
    return html.escape(mark)


def cite(source: str) -> str:
    """A source with its arXiv number as a link."""
    name, _, identifier = source.rpartition("arXiv ")
    return f'{name}<a href="https://arxiv.org/abs/{identifier}">arXiv {identifier}</a>'


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add("--results", Path, "folder that reproduce.py wrote to, its --output_dir", metavar="FOLDER",
               default=Path("output/reproduce"))  # fmt: skip
    parser.add("--output", Path, "the page to write", metavar="FILE", default_text="report.html in --results")
    return parser.parse_args(arguments)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output = args.output or args.results / "report.html"
    report = Report.read(args.results)
    page, pictures = report.page()
    folder = output.with_suffix("")
    try:
        for picture in pictures:
            with atomic_write(folder / f"{picture.name}.png") as partial:
                partial.write_bytes(picture.png)
        with atomic_write(output) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or output}: {error.strerror}") from error
    for problem in report.damaged:
        print(f"note: {problem}", file=sys.stderr)
    print(f"{output} ({len(page) / 1e6:.1f} MB), and its {len(pictures)} pictures in {folder}")


if __name__ == "__main__":
    sys.exit(main())
