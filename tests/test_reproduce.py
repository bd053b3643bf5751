"""reproduce.py and report.py: what is measured is right, kept, and shown for what it is."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import CONTEXT, free_port, make_weights

import report as page
import reproduce as program
from models import (
    PRESETS,
    AnnealedSteps,
    CachePolicy,
    ImageNoise,
    Method,
    count_flops,
    create_model,
    find_method,
    sample_tokens,
)
from models.lazymar.flops import Flops, flops_per_step
from models.lazymar.plan import make_plan
from models.lazymar.schedules import chain_timesteps
from models.lazymar.selection import RowSelection
from util.errors import InputError
from util.job.processes import launch
from util.report import figures
from util.report.findings import Findings
from util.report.table import other_settings
from util.reproduction.ablations import ABLATIONS
from util.reproduction.frontier import FRONTIER, costs_of
from util.reproduction.paper import TABLE, TABLE_METHODS
from util.reproduction.redundancy import ROW_GROUPS, measure_redundancy, trace
from util.reproduction.results import Comparison, Conditions, FrontierPoint, Inputs, Record, Redundancy, Results, Row
from util.reproduction.study import inputs_of
from util.runs.options import Options, check, parse_options
from util.scoring.jackknife import Spread, difference, groups_of_images, jackknife
from util.scoring.scores import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = shlex.split(
    "--models mar_tiny --num_images 20 --ablation_images 20 --eval_bsz 10 --num_iter 8 --num_sampling_steps 3 "
    "--ablations selection --method mar lazymar lazymar+disa --device cpu --dtype float32"
)
RANDOM = CachePolicy(start_step=1, selection="random", min_margin=0, kept_fractions=((0, 0.3),))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with random weights of mar_tiny and its VAE."""
    folder = tmp_path_factory.mktemp("weights")
    make_weights(folder)
    return folder


def use_weights(folder: Path) -> None:
    files = {"checkpoint": str(folder / "checkpoint-last.safetensors"), "vae_path": str(folder / "vae.safetensors")}
    PRESETS["mar_tiny"] = dataclasses.replace(PRESETS["mar_tiny"], **files)


@pytest.fixture(autouse=True)
def random_weights(weights, monkeypatch):
    monkeypatch.setitem(PRESETS, "mar_tiny", PRESETS["mar_tiny"])
    monkeypatch.setattr(figures, "DPI", 50)  # quicker
    use_weights(weights)


def run(folder: Path, *more: object) -> int:
    """reproduce.py in this process; returns its exit code."""
    arguments = [*SMALL, "--output_dir", str(folder), *map(str, more)]
    return launch(lambda job: program.reproduce(job, program.parse_args(arguments)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights) -> Path:
    """What a small run leaves."""
    before, folder = PRESETS["mar_tiny"], tmp_path_factory.mktemp("reproduce") / "whole"
    use_weights(weights)
    assert run(folder) == 0
    PRESETS["mar_tiny"] = before
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """That, to be maltreated: in the same place, because run folders are part of no result."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def kind_of(name: str) -> type:
    kinds = {"ablation": Comparison, "frontier": FrontierPoint}
    return kinds.get(name.partition("-")[0], Redundancy if name.endswith("redundancy") else Row)


def results(folder: Path) -> dict[str, Record]:
    files = Results(folder / "results")
    return {path.stem: files.read(kind_of(path.stem), path.stem) for path in files.folder.glob("*.json")}


def change(folder: Path, name: str, **fields: object) -> None:
    """Write a record anew, with other fields of its own or of its result."""
    record = results(folder)[name]
    of_record = {field: fields.pop(field) for field in ("inputs", "conditions") if field in fields}
    changed = dataclasses.replace(record, result=dataclasses.replace(record.result, **fields), **of_record)
    Results(folder / "results").write(name, changed)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--models", "mar_giant"], ["mar_giant", *PRESETS]),
        (["--ablations", "all", "colour"], ["all", *ABLATIONS]),
        (["--ablations", "colour"], ["colour", *ABLATIONS, "none"]),
        (["--num_images", "0"], ["--num_images"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(arguments, listed):
    with pytest.raises(InputError) as caught:
        program.parse_args(arguments)
    assert all(name in str(caught.value) for name in listed)


def test_more_ablation_images_than_there_will_be_are_refused_before_long_work(tmp_path, capsys):
    assert run(tmp_path / "run", "--ablation_images", 21) == 2
    assert "--ablation_images must be at most the 20" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# More scores


def test_more_scores_come_from_the_runs_that_are_there_and_are_reported(copy, monkeypatch, tmp_path):
    features = torch.rand(30, 128, generator=torch.Generator().manual_seed(0))
    Statistics.from_features(features, keep=None).save(tmp_path / "reference.npz")
    monkeypatch.setattr("eval.Sampler.__call__", None)
    monkeypatch.setattr(program, "compare_steps", lambda *_: None)  # samples by itself
    assert run(copy, "--precision_recall", "--kid", "--statistics", tmp_path / "reference.npz") == 0
    row = results(copy)["mar_tiny-lazymar"].result
    metrics = json.loads((copy / "mar_tiny" / "lazymar" / "metrics.json").read_text())
    assert row.evaluation.precision == metrics["precision_fashion_classifier"]
    assert row.evaluation.kid == metrics["kid_fashion_classifier_mean"]
    assert page.main(["--results", str(copy)]) == 0
    text = (copy / "report.html").read_text()
    assert f"recall {row.evaluation.recall:.3f}" in text and f"KID {row.evaluation.kid:.5f}" in text
    assert "FD-DINOv2" not in text


# Random selection


def selected_rows(monkeypatch, model, num_images: int, policy: CachePolicy) -> list[tuple]:
    """(step, rows [B, kept]) of each choice of rows in a run."""
    choices, choose = [], RowSelection.__call__

    def noting(self, step, attention, values):
        rows = choose(self, step, attention, values)
        if rows is not None:
            choices.append((step, rows))
        return rows

    monkeypatch.setattr(RowSelection, "__call__", noting)
    noise = ImageNoise(model, 3, range(num_images), 2)
    settings = {"num_iter": 10, "cfg": 2.0, "num_sampling_steps": 2, "cache": policy}
    sample_tokens(model, torch.arange(num_images) % model.class_num, noise=noise, **settings)
    monkeypatch.undo()
    return choices


def test_random_selection_keeps_what_must_stay_and_depends_on_the_image_alone(monkeypatch):
    model = create_model("mar_tiny", img_size=16)
    alone, together = (selected_rows(monkeypatch, model, count, RANDOM) for count in (1, 3))
    other_numbers = selected_rows(monkeypatch, model.double(), 3, RANDOM)
    assert len(alone) == 8  # all but the first step and the refresh after nine
    for (step, rows), (_, first), (_, wide) in zip(together, alone, other_numbers):
        always = set(range(model.buffer_size + step.previous, model.buffer_size + step.stop))
        assert all(always <= set(row.tolist()) and len(set(row.tolist())) == step.num_kept for row in rows)
        assert rows[:1].tolist() == first.tolist() and rows.tolist() == wide.tolist()
    chosen = [set(row.tolist()) for step, rows in together for row in rows]
    assert len(set(map(frozenset, chosen))) == len(chosen), "images or steps share their random rows"
    counts = np.bincount(torch.cat([rows.flatten() for _, rows in together]))[: model.buffer_size]
    assert counts.min() > 0 or counts.std() < counts.mean(), "some rows are preferred"


def test_random_selection_without_the_condition_cache_takes_the_same_rows_in_both_branches(monkeypatch):
    policy = dataclasses.replace(RANDOM, condition_cache=False)
    for _, rows in selected_rows(monkeypatch, create_model("mar_tiny", img_size=16), 2, policy):
        assert rows[:2].tolist() == rows[2:].tolist()


def test_selection_is_a_flag_of_eval():
    base = ["--model", "mar_tiny", "--lazy_mar"]
    assert check(parse_options("", base)).method.cache.selection == "similarity"
    assert check(parse_options("", [*base, "--selection", "random"])).method.cache.selection == "random"
    with pytest.raises(InputError, match="--selection must be similarity or random, not fair"):
        parse_options("", [*base, "--selection", "fair"])


# What is counted and measured


def test_flops_per_step_sum_to_the_total_and_follow_the_plan():
    with torch.device("meta"):
        model = create_model("mar_tiny")
    plans = {
        policy: make_plan(
            model.seq_len, model.buffer_size, Method(num_iter=16, num_sampling_steps=10, cache=policy), cfg=4.0
        )
        for policy in (None, CachePolicy(), CachePolicy(selection="random"))
    }
    for policy, plan in plans.items():
        steps = flops_per_step(model, plan)
        total = count_flops(model, num_iter=16, cfg=4.0, num_sampling_steps=10, cache=policy)
        assert len(steps) == 16 and all(min(step) > 0 for step in steps)
        assert Flops(*map(sum, zip(*steps))) == total
        per_token = {step.head / (planned.stop - planned.start) for step, planned in zip(steps[1:], list(plan)[1:])}
        assert len(per_token) == 1
    steps = flops_per_step(model, plans[CachePolicy()])
    transformer = [step.encoder + step.decoder for step in steps]
    assert transformer[14] > 2 * transformer[13], "step 14 is the refresh after step 5"


def test_the_papers_speed_ups_are_ratios_of_its_flops():
    for (model, _), row in TABLE.items():
        assert row.speed_up == pytest.approx(TABLE[model, "baseline"].tflops / row.tflops, abs=0.006)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=200)
    groups = np.arange(200)
    (mean, square) = jackknife(lambda chosen: [values[chosen].mean(), 2 * values[chosen].mean()], groups)
    assert mean.value == values.mean() and mean.error == pytest.approx(values.std(ddof=1) / math.sqrt(200))
    assert square.error == pytest.approx(2 * mean.error)
    assert math.isnan(jackknife(lambda chosen: [1.0], np.zeros(5))[0].error)
    labels = np.arange(300) % 10
    groups = groups_of_images(labels.tolist())
    assert groups.tolist() == (np.arange(300) // 10 % 10).tolist()
    assert all(np.bincount(labels[groups == group]).tolist() == [3] * 10 for group in range(10))


def test_the_error_of_a_paired_difference_leaves_out_what_both_have_in_common():
    common = np.random.default_rng(0).normal(size=10)
    more = difference(common + np.arange(10) / 10, common)
    assert more == pytest.approx((0.45, np.std(np.arange(10) / 10, ddof=1) / math.sqrt(10)))
    assert math.isnan(difference([2.0], [1.0]).error) and difference([2.0], [1.0]).value == 1


def test_traced_features_are_the_networks():
    model = create_model("mar_tiny", img_size=16)
    noise = ImageNoise(model, 0, range(2), 2)
    labels, order = torch.tensor([3, 7]), noise.orders.flip(1)
    tokens = torch.randn(2, model.seq_len, model.token_dim)
    plan = make_plan(model.seq_len, model.buffer_size, Method(num_iter=6), cfg=3.0)
    with torch.inference_mode():
        for features in trace(model, labels, plan, tokens, order, layer=3):
            known, masked = order[:, : features.step.start], order[:, features.step.start :]
            expected = model(model.class_emb(labels), tokens[:, : known.shape[1]], order)
            rows = features.output[:2, model.buffer_size + known.shape[1] :]
            torch.testing.assert_close(model.conditions(rows, masked), expected, rtol=1e-4, atol=1e-5)
            assert features.values.shape == (2, model.buffer_size + model.seq_len, 2, 64)


def test_redundancy_tells_changed_rows_from_others():
    torch.manual_seed(0)
    model = create_model("mar_tiny", img_size=16)
    found = measure_redundancy(model, num_images=2, seed=0, cfg=3.0, method=Method(num_iter=12, num_sampling_steps=2))
    just_predicted, _, others = (np.mean(found.values[group].mean) for group in ROW_GROUPS)
    assert just_predicted < 0.9 < others <= 1
    for change in (found.change, found.error_difference, found.error_output):
        assert len(change.mean) == len(found.distances) == 9
        assert change.mean[0] < change.mean[-1] and change.low < change.mean < change.high


# Running and continuing


def test_each_ablation_varies_one_setting_of_the_papers():
    for ablation in ABLATIONS.values():
        assert CachePolicy() in ablation.policies.values()
        assert len(set(ablation.policies.values())) == len(ablation.policies)


def test_every_row_and_ablation_is_measured_once(whole):
    found = results(whole)
    rows = [f"{model}-{method}" for model in PRESETS for method in ("baseline", "lazymar")]
    ablations = ["ablation-baseline", "ablation-selection-similarity", "ablation-selection-chance"]
    methods = ["frontier-mar", "frontier-lazymar", "frontier-lazymar+disa"]
    assert set(found) == {*rows, *ablations, *methods, "mar_tiny-redundancy"}
    assert [path.name for path in (whole / "mar_tiny" / "frontier").iterdir()] == ["lazymar+disa"]
    made = sorted(path.name for path in (whole / "mar_tiny" / "ablations").iterdir())
    assert made == ["selection-chance"]  # by similarity, as the paper does, is LazyMAR's row of the table
    lazy, huge = found["mar_tiny-lazymar"].result, found["mar_huge-lazymar"].result
    assert lazy.evaluation.num_images == 20 and not lazy.unfinished and lazy.parameters > 3e6
    assert lazy.flops.total == lazy.evaluation.flops_per_image
    assert huge.evaluation is None and not huge.unfinished and len(huge.flops_per_step) == 8
    # What is a row of the table is not evaluated again as an ablation.
    assert found["ablation-baseline"].result.fid.value == found["mar_tiny-baseline"].result.evaluation.fid
    assert found["ablation-selection-similarity"].result.fid != found["ablation-selection-chance"].result.fid
    metrics = json.loads((whole / "mar_tiny" / "lazymar" / "metrics.json").read_text())
    for name, key in {"fid": "fid_fashion_classifier", "inception_score": "isc_fashion_classifier_mean"}.items():
        assert getattr(lazy.evaluation, name) == metrics[key]
    for name in ("seconds_per_image", "sampling_seconds", "flops_per_image", "notes"):
        assert getattr(lazy.evaluation, name) == metrics[name]


def test_distances_are_those_of_the_images(whole):
    found = results(whole)
    assert found["ablation-baseline"].result.pixel_distance == (0, 0)
    folders = [whole / "mar_tiny" / name / "images" for name in ("baseline", "ablations/selection-chance")]
    images = [np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())]) for folder in folders]
    difference = np.abs(images[0].astype(float) - images[1]).mean(axis=(1, 2, 3))
    value, error = found["ablation-selection-chance"].result.pixel_distance
    assert value == pytest.approx(difference.mean(), rel=1e-5) and value > 0.1
    groups = groups_of_images([index % 10 for index in range(20)])
    means = [difference[groups == group].mean() for group in range(10)]
    assert error == pytest.approx(np.std(means, ddof=1) / math.sqrt(10), rel=1e-4)
    assert found["ablation-selection-chance"].result.pixel_distance_by_group == pytest.approx(means, rel=1e-5)


def test_a_point_of_the_frontier_holds_scores_beside_lazymars_and_costs_of_every_model(whole):
    found = results(whole)
    mar, lazymar, composed = (found[FrontierPoint.name(name)].result for name in ("mar", "lazymar", "lazymar+disa"))
    assert mar.evaluation == found["mar_tiny-baseline"].result.evaluation
    assert lazymar.scores.fid_difference == (0, 0)
    assert mar.scores.fid_difference.value == pytest.approx(mar.scores.fid.value - lazymar.scores.fid.value)
    assert mar.scores.fid == found["ablation-baseline"].result.fid
    assert composed.settings == "lazymar+disa, num_iter 8" and composed.scores.fid_difference.error > 0
    for point in (mar, lazymar, composed):
        of_classes = point.scores.intended_by_class
        assert len(of_classes) == 10 and np.mean(of_classes) == pytest.approx(point.scores.share_intended.value)
        assert point.costs.keys() == PRESETS.keys() and point.costs["mar_huge"].transformer_steps == 8
    assert mar.costs["mar_huge"].head_evaluations == 8 * 3 and mar.costs["mar_huge"].cached_numbers == 0
    # DiSA's plan at 8 steps, of which chains that begin above timestep 950 lose one or two steps.
    wanted = AnnealedSteps().at
    assert composed.costs["mar_huge"].head_evaluations == sum(
        len(chain_timesteps(wanted(step, 8, 0), 950)) for step in range(8)
    )
    assert composed.costs["mar_huge"].flops.encoder == lazymar.costs["mar_huge"].flops.encoder
    # Keys and values of the encoder and behind the decoder's prune layer, the values compared, and the difference.
    model, rows = PRESETS["mar_huge"].architecture, 256 + 64
    width, blocks = model["encoder_embed_dim"], model["encoder_depth"]
    assert lazymar.costs["mar_huge"].cached_numbers == (
        2 * rows * width * blocks + 2 * rows * width * (blocks - 4) + rows * width + 256 * width
    )


@pytest.mark.parametrize("method", ["mar", "gtr", "recap", "lazymar+disa+lateguidance"])
def test_the_costs_of_every_method_are_known_without_a_run(method):
    costs = costs_of(check(Options(model="mar_tiny", method=find_method(method))))
    assert costs.flops == count_flops(check(Options(model="mar_tiny")).meta_model, method, cfg=PRESETS["mar_tiny"].cfg)
    assert costs.transformer_steps == (32 if "gtr" in method else 64)
    if method == "mar":
        assert costs.head_evaluations == 6400 and costs.cached_numbers == 0
    elif "gtr" in method:  # two chains at each of the last two steps
        assert 30 * 18 < costs.head_evaluations < 30 * 50 + 2 * 70


def test_methods_of_the_frontier_are_chosen_by_name():
    assert program.parse_args([]).method.keys() == set(FRONTIER)
    assert list(program.parse_args(["--method", "DiSA+LazyMAR", "mar"]).method) == ["lazymar+disa", "mar"]
    assert program.parse_args(["--method", "none"]).method == {}
    for wrong, message in [("foo", "--method 'foo' is unknown"), ("lazymar+recap", "--method lazymar+recap cannot be")]:
        with pytest.raises(InputError, match=re.escape(message)):
            program.parse_args(["--method", wrong])


def test_a_second_command_measures_only_what_was_lost(copy, monkeypatch, capsys):
    before = {name: (copy / "results" / f"{name}.json").read_bytes() for name in results(copy)}
    evaluated, evaluate = [], program.evaluate

    def record(job, options):
        evaluated.append(options.output_dir.name)
        return evaluate(job, options)

    monkeypatch.setattr(program, "evaluate", record)
    monkeypatch.setattr(program, "measure_redundancy", None)
    assert run(copy) == 0 and not evaluated
    assert before == {name: (copy / "results" / f"{name}.json").read_bytes() for name in results(copy)}

    damaged = copy / "results" / "mar_tiny-baseline.json"
    damaged.write_text(damaged.read_text().replace('"parameters": 3', '"parameters": 5'))
    cut = copy / "results" / "ablation-baseline.json"
    cut.write_bytes(cut.read_bytes()[:100])
    (copy / "mar_tiny" / "ablations" / "selection-chance" / "images" / "000003.png").unlink()
    capsys.readouterr()
    assert run(copy) == 0 and evaluated == ["baseline", "selection-chance"]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "damaged" in line]
    assert len(notes) == 2 and "mar_tiny-baseline.json" in notes[0] and "ablation-baseline.json" in notes[1]
    again, measured = results(copy), json.loads(before["ablation-baseline"])["record"]
    assert again["mar_tiny-baseline"].result.parameters < 5e6
    assert dataclasses.asdict(again["ablation-baseline"].inputs) == measured["inputs"]
    for score in ("fid", "inception_score"):
        assert list(getattr(again["ablation-baseline"].result, score)) == measured["result"][score]
    assert (copy / "mar_tiny" / "ablations" / "selection-chance" / "images" / "000003.png").exists()


def test_folders_of_other_settings_are_refused_before_any_work(copy, monkeypatch, capsys):
    before = {name: (copy / "results" / f"{name}.json").read_bytes() for name in results(copy)}
    monkeypatch.setattr(program, "evaluate", None)
    shutil.rmtree(copy / "mar_tiny" / "baseline")  # of the first row
    for arguments in (["--seed", "1"], ["--num_images", "30"], ["--models", "mar_base", "mar_tiny", "--eval_bsz", "5"]):
        assert run(copy, *arguments) == 2
        assert "mar_tiny/lazymar holds a run with other settings" in capsys.readouterr().err
    assert before == {name: (copy / "results" / f"{name}.json").read_bytes() for name in results(copy)}


def test_overwriting_leaves_runs_of_the_same_settings(copy, monkeypatch):
    evaluated, evaluate = {}, program.evaluate

    def record(job, options):
        evaluated[options.output_dir.name] = options.overwrite
        return evaluate(job, options)

    monkeypatch.setattr(program, "evaluate", record)
    monkeypatch.setattr(program, "compare_steps", lambda *_: None)
    (copy / "mar_tiny" / "lazymar" / "images" / "000003.png").unlink()
    kept = copy / "mar_tiny" / "lazymar" / "images" / "000015.png"
    time_of_writing = kept.stat().st_mtime_ns
    assert run(copy, "--overwrite") == 0 and evaluated == {"lazymar": False}
    assert kept.stat().st_mtime_ns == time_of_writing
    evaluated.clear()
    assert run(copy, "--overwrite", "--seed", 1, "--ablations", "none", "--method", "none") == 0
    assert evaluated == {"baseline": True, "lazymar": True}


def _rank(arguments: list[str], weights: Path, rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    torch.set_num_threads(1)
    use_weights(weights)
    code = launch(lambda job: program.reproduce(job, program.parse_args(arguments)))
    os._exit(code)


def test_two_processes_measure_the_same(tmp_path, whole, weights):
    arguments, port = [*SMALL, "--method", "none", "--output_dir", str(tmp_path / "run")], free_port()
    ranks = [CONTEXT.Process(target=_rank, args=(arguments, weights, rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    mine, theirs = results(tmp_path / "run"), results(whole)
    assert set(theirs) - set(mine) == {FrontierPoint.name(name) for name in ("mar", "lazymar", "lazymar+disa")}
    assert set(mine) < set(theirs) and mine["mar_tiny-baseline"].conditions.processes == 2
    name = "ablation-selection-chance"
    for measure in ("fid", "fid_difference", "inception_score", "pixel_distance"):
        assert getattr(mine[name].result, measure) == getattr(theirs[name].result, measure)


def test_without_weights_the_rest_is_measured_and_the_missing_file_named(tmp_path, monkeypatch):
    nowhere = str(tmp_path / "nowhere.safetensors")
    monkeypatch.setitem(PRESETS, "mar_tiny", dataclasses.replace(PRESETS["mar_tiny"], checkpoint=nowhere))
    assert run(tmp_path / "run") == 0
    found = results(tmp_path / "run")
    assert not any(name.startswith("ablation") or "redundancy" in name for name in found)
    for method in TABLE_METHODS:
        row = found[Row.name("mar_tiny", method)].result
        assert nowhere in row.not_run and row.evaluation is None and not row.unfinished
        assert row.latency.seconds > 0 and row.latency.how == "timed in full"
    text = make_page(tmp_path / "run")
    assert "seconds are of one image, random weights, timed in full" in text
    assert f"NOT RUN:</span> weights missing: {nowhere}" in text and "RANDOM WEIGHTS:" in text


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "run", "--dry_run") == 0
    printed = capsys.readouterr().out
    words = [
        "lazymar+disa, mar_huge: ",
        "8 steps: 6 in full, 2 lazy",
        "TFLOPs",
        "encoder",
        "parameters  3.9 M",
        "GB",
        "s per image",
    ]
    for word in [*words, "ablations: 1 further run(s)"]:
        assert word in printed, word
    assert not list(tmp_path.iterdir())


# The page


def make_page(folder: Path) -> str:
    assert page.main(["--results", str(folder)]) == 0
    return (folder / "report.html").read_text()


class Sources(HTMLParser):
    """All that a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.links, self.tags, self.texts = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
            self.texts.append(values["alt"])
        if tag == "link":
            self.links.append(values["href"])


def test_the_page_holds_every_picture_and_fetches_nothing(whole):
    text = make_page(whole)
    found = Sources(text)
    pictures = {path.read_bytes() for path in (whole / "report").glob("*.png")}
    embedded = [
        base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in found.images
    ]
    assert len(embedded) == len(pictures) > 8 and set(embedded) == pictures
    for picture in embedded:
        with Image.open(io.BytesIO(picture)) as image:
            assert image.width == 250 and np.ptp(np.array(image.convert("L"))) > 100, "blank, or of another width"
    assert all(len(alt) > 20 for alt in found.texts)
    assert found.links == ["data:,"] and not found.tags & {"script", "iframe", "object", "video"}
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    for source in ("2503.12450", "2506.12035", "2510.17171", "2505.20297"):
        assert f'href="https://arxiv.org/abs/{source}"' in text
    assert "15.49" in text and "23.60" in text and "299.2" in text


def test_the_page_shows_the_frontier_with_costs_and_published_figures(whole):
    text = make_page(whole)
    assert (whole / "report" / "frontier.png").exists()
    point = results(whole)["frontier-lazymar+disa"].result
    section = text.partition("<h2>The frontier</h2>")[2].partition("<h2>")[0]
    assert "lazymar+disa, num_iter 8" in section and f"{point.scores.share_intended.value:.1%}" in section
    assert f"{point.costs['mar_huge'].flops.total / 1e12:.3f}" in section and "304.4" in section


def test_the_pareto_set_is_what_nothing_beats():
    points = [(1, 9.0), (2, 5.0), (3, 6.0), (3, 4.0), (4, 4.0), (5, 2.0)]
    assert figures.pareto_set(points) == [(1, 9.0), (2, 5.0), (3, 4.0), (5, 2.0)]


def test_points_of_other_settings_are_not_mixed(copy):
    inputs = results(copy)["frontier-lazymar+disa"].inputs
    change(copy, "frontier-lazymar+disa", inputs=dataclasses.replace(inputs, settings={**inputs.settings, "seed": 1}))
    assert list(Findings.read(copy).frontier) == ["mar", "lazymar"]


def test_other_settings_than_the_papers_are_named(whole):
    text = make_page(whole)
    row = text.partition("tiny, LazyMAR")[2].partition('class="values"')[0]
    assert "num_iter 8 instead of 64" in row and "num_images 20 instead of 50000" in row
    settings = json.loads(json.dumps(check(parse_options("", ["--model", "mar_huge", "--lazy_mar"])).settings(
        torch.device("cuda"), torch.bfloat16)))  # fmt: skip
    record = Record(Row("mar_huge", "LazyMAR", 0, []), Inputs(settings, {}), Conditions({}, "", 1, ""))
    assert other_settings(record) == []
    settings["cache"]["refresh_interval"] = 5
    assert other_settings(record) == ["refresh_interval 5 instead of 9"]


def test_what_is_not_finished_is_shown_as_partial(copy):
    assert "PARTIAL" not in make_page(whole_of_ablations(copy))
    change(copy, "mar_tiny-lazymar", evaluation=None)
    (copy / "mar_tiny" / "lazymar" / "images" / "000019.png").unlink()
    (copy / "results" / "ablation-selection-chance.json").unlink()
    (copy / "results" / "mar_base-baseline.json").unlink()
    text = make_page(copy)
    assert "PARTIAL: not finished are tiny, LazyMAR; rows kept are chosen by chance." in text
    assert "PARTIAL: there is no result of mar_base-baseline." in text
    assert "19 of 20 images are made, and none scored" in text and "PARTIAL: chance not measured." in text
    row = text.partition("tiny, LazyMAR</b>")[2].partition('class="values"')[0]
    assert 'data-label="FID"><b>–</b>' in row


def whole_of_ablations(folder: Path) -> Path:
    """The folder with results for the ablations that were not run, so that nothing is lacking."""
    files = Results(folder / "results")
    example = files.read(Comparison, "ablation-selection-chance")
    for ablation, kind in ABLATIONS.items():
        for label in kind.policies:
            if not files.path(name := Comparison.name(ablation, label)).exists():
                result = dataclasses.replace(example.result, ablation=ablation, label=label)
                files.write(name, dataclasses.replace(example, result=result))
    return folder


def test_ablations_of_other_settings_are_not_mixed(copy):
    inputs = results(copy)["ablation-selection-chance"].inputs
    change(copy, "ablation-selection-chance", inputs=dataclasses.replace(inputs, num_images=10))
    assert "PARTIAL: chance not measured." in make_page(copy)


def test_results_are_read_as_they_were_written(whole, tmp_path):
    """Every kind, with what is not known, and by a process that has nothing but the file."""
    for name, record in results(whole).items():
        Results(tmp_path).write(name, record)
        assert Results(tmp_path).read(kind_of(name), name) == record
    row = results(whole)["mar_huge-baseline"]
    options = check(parse_options("", ["--model", "mar_tiny", "--lazy_mar"]))
    inputs = inputs_of(options, torch.device("cpu"), torch.float32, files=False)
    Results(tmp_path).write("row", dataclasses.replace(row, inputs=inputs))
    assert Results(tmp_path).read(Row, "row").inputs == inputs
    comparison = dataclasses.replace(results(whole)["ablation-baseline"].result, fid=Spread(1.5, math.nan))
    Results(tmp_path).write("one group", Record(comparison, inputs, row.conditions))
    assert math.isnan(Results(tmp_path).read(Comparison, "one group").result.fid.error)


def test_results_of_another_version_or_with_other_fields_are_not_taken_for_this_ones(copy):
    files, path = Results(copy / "results"), copy / "results" / "mar_tiny-baseline.json"
    with pytest.raises(InputError, match=r"mar_tiny-baseline\.json is .*another version.*run reproduce.py again"):
        files.read(Redundancy, "mar_tiny-baseline")
    path.write_text(re.sub(r'"format": \d+', '"format": 2', path.read_text()))
    with pytest.raises(InputError, match=r"mar_tiny-baseline\.json is .*another version.*run reproduce.py again"):
        files.read(Row, "mar_tiny-baseline")


def test_damaged_results_are_named_on_the_page(copy, capsys):
    (copy / "results" / "mar_tiny-redundancy.json").write_text("{")
    text = make_page(copy)
    assert "mar_tiny-redundancy.json is damaged" in text and "run reproduce.py again" in text
    assert "mar_tiny-redundancy.json is damaged" in capsys.readouterr().err


def test_what_results_say_is_text_and_no_html(copy):
    change(copy, "mar_huge-baseline", not_run="<script>alert(1)</script> & more")
    text = make_page(copy)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text and "<script" not in text


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert page.main(["--results", str(tmp_path)]) == 2
    assert "run reproduce.py first" in capsys.readouterr().err


CHECK = """<script>
window.addEventListener('load', () => {
  const images = [...document.images];
  document.body.dataset.shown = images.filter(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 100).length;
  document.body.dataset.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
});
</script>"""


def test_the_page_loads_in_a_browser(copy, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        message = "no Chromium on this machine: the report was not opened in a browser"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    text = make_page(copy)
    # The script that looks at the page is the only one that its policy lets run, in a copy.
    checked = tmp_path / "checked.html"
    checked.write_text(
        text.replace("img-src", "script-src 'unsafe-inline'; img-src").replace("</body>", CHECK + "</body>")
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=390,800"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *flags, checked.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    shown = re.search(r'data-shown="(\d+)"', done.stdout)
    assert shown and int(shown[1]) == text.count("<img "), "some pictures are not shown"
    assert 'data-wide="false"' in done.stdout, "the page is wider than a phone"
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
