"""reproduce.py: what it evaluates, what it computes from the run folders, and the page that it draws."""

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import Ranks

import reproduce as program
from models import PRESETS, CachePolicy, find_method
from models.presets import MAR_MODELS
from util.errors import InputError
from util.folder import open_finished
from util.processes import launch
from util.report import figures
from util.report.results import Row, compare
from util.study import ABLATIONS, METHODS_COMPARED, runs_of

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
SMALL = (
    *("--models", "mar_tiny", "--num_images", "12", "--eval_bsz", "6", "--num_iter", "7"),
    *("--num_sampling_steps", "2", "--device", "cpu", "--dtype", "float32"),
)
COMPARED = (
    *("--ablations", "caches", "selection", "--ablation_images", "2"),
    *("--method", "mar", "lazymar", "lateguidance"),
)
PICTURES = {"errors_mar_tiny", "frontier", "redundancy_mar_tiny", "rows_by_step", "side_by_side_mar_tiny"}


def run(folder: Path, *more: object) -> int:
    """Run reproduce.py in this process; return its exit code."""
    arguments = ["reproduce.py", *SMALL, "--output_dir", str(folder), *map(str, more)]
    with mock.patch.object(sys, "argv", arguments), mock.patch.object(figures, "DPI", 50):
        return launch(program.main)


def runs(*arguments: str) -> dict:
    return runs_of(program.parse_args(list(arguments)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What a small study leaves."""
    folder = tmp_path_factory.mktemp("reproduce")
    assert run(folder, *COMPARED) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# What is evaluated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models mar_giant", "--models: invalid choice: 'mar_giant'"),
        ("--method foo", "--method 'foo' is unknown"),
        ("--num_iter 300", "--num_iter"),
        ("--num_iter 5", "no step is lazy"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_flag(arguments, message):
    with pytest.raises(InputError, match=message):
        runs(*arguments.split())


def test_a_study_is_commands_of_eval():
    everything = runs("--kid", "--statistics", "reference.npz", "--seed", "3", "--num_iter", "32")
    huge, tiny = everything["mar_huge", "lazymar"], everything["mar_tiny", "lazymar"]
    assert (huge.num_images, huge.eval_bsz, tiny.num_images, tiny.eval_bsz) == (50_000, 128, 2_000, 25)
    assert (huge.seed, huge.method.num_iter, huge.output_dir) == (3, 32, Path("output/reproduce/mar_huge/lazymar"))
    # The flags of scores are meant for Inception's features, unless mar_tiny is alone.
    assert (huge.metrics, huge.statistics) == (("kid",), Path("reference.npz"))
    assert (tiny.metrics, tiny.statistics) == ((), PRESETS["mar_tiny"].statistics_path)
    alone = runs("--models", "mar_tiny", "--kid", "--overwrite")
    assert alone["mar_tiny", "mar"].metrics == ("kid",) and alone["mar_tiny", "fast"].metrics == ()
    assert all(options.overwrite for options in alone.values())
    # Methods keep their own numbers of steps.
    assert everything["mar_tiny", "gtr"].method == find_method("gtr")
    assert everything["mar_tiny", "lazymar+disa"].method == replace(find_method("lazymar+disa"), num_iter=32)
    folders = {options.output_dir for options in everything.values()}
    assert len(folders) == len(everything) == 3 * 2 + len(METHODS_COMPARED)


def test_each_ablation_varies_one_setting_of_the_papers():
    for group in ABLATIONS.values():
        assert list(group.values()).count(CachePolicy()) == 1 and len(set(group.values())) == len(group)


# Running


def test_the_same_command_draws_the_page_and_measures_nothing_again(copy, monkeypatch):
    file = copy / "mar_tiny" / "mar" / "run.json"
    file.write_text(file.read_text().replace('"torch": "', '"torch": "<script>alert(1)</script> & '))
    monkeypatch.setattr("models.Sampler.__call__", None)
    monkeypatch.setattr(program, "make_teacher", None)
    assert run(copy, *COMPARED) == 0
    text = (copy / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in text and "<script" not in text, "text is no HTML"


def test_folders_of_other_settings_are_refused_before_any_work(copy, monkeypatch, capsys):
    monkeypatch.setattr(program, "evaluate", None)
    shutil.rmtree(copy / "mar_tiny" / "mar")  # the first run
    assert run(copy, *COMPARED, "--seed", 1) == 2
    assert "mar_tiny/lazymar holds a run with other settings" in capsys.readouterr().err


def test_a_model_without_weights_is_skipped_with_a_note(tmp_path, monkeypatch, capsys):
    nowhere = replace(PRESETS["mar_base"], checkpoint=tmp_path / "mar_base" / "checkpoint-last.pth")
    monkeypatch.setitem(PRESETS, "mar_base", nowhere)
    assert run(tmp_path / "run", "--models", "mar_base", "--ablations", "none", "--method", "lazymar") == 0
    assert f"mar_base is skipped: no weights for mar_base: {nowhere.checkpoint}" in capsys.readouterr().out
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Nothing was run" in text and text.count("not run") > 6 and "15.49" in text
    assert not any(path.is_dir() for path in (tmp_path / "run").iterdir())


def test_two_processes_share_the_runs(copy, tmp_path, whole):
    shutil.rmtree(copy / "mar_tiny" / "lazymar")
    (copy / "report.html").unlink()
    job = Ranks([*SMALL, *COMPARED, "--output_dir", str(copy)], tmp_path / "log", 2, program="reproduce")
    assert job.wait() == [0, 0], job.log.read_text()
    name = "mar_tiny/lazymar/images/000011.png"
    assert (copy / name).read_bytes() == (whole / name).read_bytes()
    assert (copy / "report.html").exists()


def test_a_dry_run_shows_costs_beside_the_papers_within_one_gigabyte(tmp_path):
    code = "import reproduce; reproduce.launch(reproduce.main); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "--dry_run", "--output_dir", str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert not list(tmp_path.iterdir())
    assert int(re.search(r"VmHWM:\s+(\d+) kB", printed)[1]) < 1e6
    table = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines() if line.startswith("mar_")}
    assert {model for model, _ in table} == set(MAR_MODELS) and "16 runs in all" in printed
    huge = table["mar_huge", "lazymar"]
    assert huge[:5] == ["50,000", "12", "52", "320-27", "21.130"], "the plan and our TFLOPs"
    assert huge[-4:] == ["24.38", "23.60", "1.69", "299.20"], "the paper's, its code's, and the paper's FID and IS"


# What is computed


def test_comparisons_are_of_the_same_images(whole):
    options = runs(*SMALL, *COMPARED, "--output_dir", str(whole))
    baseline, other = Row(options["mar_tiny", "mar"]), Row(options["mar_tiny", "lateguidance"])
    found = compare(other, baseline)
    _, metrics, folder = open_finished(whole / "mar_tiny" / "lateguidance")
    assert found["fid"].value == metrics["frechet_inception_distance"] and found["fid"].error > 0
    assert found["fid_difference"].value == pytest.approx(found["fid"].value - baseline.fid)
    assert found["inception_score"].value == metrics["inception_score_mean"]
    seen = folder.outputs()["logits"].argmax(dim=1).numpy()
    assert found["intended"].value == np.mean(seen == np.arange(12) % 10)
    assert compare(baseline, baseline)["fid_difference"] == (0, 0)


# The page


def test_the_page_shows_our_figures_beside_the_published_ones_and_fetches_nothing(whole):
    text = (whole / "report.html").read_text()
    pictures = {base64.b64encode(path.read_bytes()).decode() for path in whole.glob("*.png")}
    assert {path.stem for path in whole.glob("*.png")} == PICTURES
    assert set(re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="[^"]{20,}">', text)) == pictures
    assert "default-src 'none'" in text and not re.search("<(script|iframe|object|video)|url\\(|@import", text)
    assert "max-width: 46rem" in text, "the style sheet"
    for published in ('href="https://arxiv.org/abs/2503.12450"', "15.49", "23.60", "299.2", "2.83×"):
        assert published in text
    table = text.partition("<h2>The paper's table</h2>")[2].partition("<h2>")[0]
    metrics = json.loads((whole / "mar_tiny" / "lazymar" / "metrics.json").read_text())
    row = table.partition("<b>mar_tiny</b>, lazymar, num_iter 7, num_sampling_steps 2")[2].partition("</tr>")[0]
    assert "12 images" in row and f"{metrics['frechet_inception_distance']:.2f}*" in row
    assert table.count("not run") == 6
    assert "similarity (paper)" in text and "random</td>" in text
    assert torch.__version__ in text and "float32" in text
