"""eval.py: the same images whoever makes them, nothing lost whatever happens, and one clear sentence for bad input."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Container
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Ranks, free_port, make_weights

import eval as program
import score
from models import PRESETS, create_model
from util.errors import InputError
from util.extractors import load_extractor
from util.options import parse_options
from util.processes import launch
from util.weights import save_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
NUM_IMAGES, BATCH_SIZE = 24, 2
SLOW = ["--num_iter", 12, "--num_sampling_steps", 8]  # long enough to be disturbed


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> list[str]:
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def command(weights):
    """The arguments of a small run into a folder; more of them replace earlier ones."""
    numbers = f"--num_images {NUM_IMAGES} --eval_bsz {BATCH_SIZE} --num_iter 3 --num_sampling_steps 3 --dtype float32"
    numbers += " --lazy_mar --start_step 1"

    def arguments(folder: Path, *more: object) -> list[str]:
        return [*weights, *numbers.split(), "--output_dir", str(folder), *map(str, more)]

    return arguments


def run(arguments: list[str]) -> int:
    """eval.py in this process; returns its exit code."""
    return launch(lambda job: program.evaluate(job, parse_options(arguments)))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, command) -> Path:
    """A finished run by one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(command(folder)) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def slow_whole(tmp_path_factory, command) -> Path:
    """A finished run by one process, with the settings `SLOW`."""
    folder = tmp_path_factory.mktemp("runs") / "slow"
    job = Ranks(command(folder, *SLOW), folder.with_suffix(".log"))
    assert job.wait() == [0], job.log.read_text()
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The finished run, to be maltreated."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*.png")}


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def scores(folder: Path) -> dict:
    return {name: value for name, value in read_metrics(folder).items() if name.startswith(("frechet", "inception"))}


def assert_same(folder: Path, whole: Path) -> None:
    assert images(folder) == images(whole) and len(images(whole)) >= NUM_IMAGES
    assert scores(folder) == scores(whole) and len(scores(whole)) == 3
    assert not list(folder.rglob("*.partial"))


def records(folder: Path) -> int:
    return len(list((folder / "batches").glob("*.npz")))


def wait_until(condition, is_alive) -> None:
    """Wait for a condition as long as the processes that bring it about live."""
    while not condition():
        assert is_alive() or condition(), "the processes have ended"
        time.sleep(0.02)


# The same images


def test_images_and_scores_are_the_same_in_every_world(tmp_path, command, whole):
    job = Ranks(command(tmp_path / "run"), tmp_path / "log", 3)
    assert job.wait() == [0] * 3, job.log.read_text()
    assert_same(tmp_path / "run", whole)
    log = job.log.read_text().splitlines()
    assert log[0].startswith("cpu (1 threads of ") and log[0].endswith(", float32, world size 3")
    assert any("| 24/24 [" in line for line in log), "no progress"


def test_a_run_goes_on_with_another_batch_size(copy, command, capsys, whole):
    for number in (4, 6, 8, 20):
        (copy / "batches" / f"{number:06d}.npz").unlink()
    for index in (4, 5, 6, 9):
        (copy / "images" / f"{index:06d}.png").unlink()
    assert run(command(copy, "--eval_bsz", 5)) == 0
    printed = capsys.readouterr().out
    assert "rounded differently (eval_bsz 2 there, 5 now)" in printed
    assert "note: the FID of so few images, 24, is far too high" in printed
    files = [sorted((folder / "images").iterdir()) for folder in (whole, copy)]
    before, after = (np.stack([np.array(Image.open(file)).astype(int) for file in each]) for each in files)
    assert abs(before - after).max() <= 1 and (before != after).mean() < 1e-3
    assert before.std() > 1, "the images are blank, so that they show nothing"
    sizes = {path.name: len(np.load(path)["indices"]) for path in (copy / "batches").iterdir()}
    assert sizes["000004.npz"] == 5 and sizes["000009.npz"] == 3 and sum(sizes.values()) == NUM_IMAGES


def test_the_features_that_are_scored_are_those_of_the_pngs(whole):
    record = np.load(whole / "batches" / "000006.npz")
    pngs = [np.array(Image.open(whole / "images" / f"{index:06d}.png")) for index in (6, 7)]
    features = [load_extractor("fashion")(torch.from_numpy(png).permute(2, 0, 1)[None])["features"] for png in pngs]
    np.testing.assert_allclose(record["features"], torch.cat(features).numpy(), rtol=1e-5, atol=1e-6)


def test_metrics_tell_what_was_measured(whole):
    metrics = read_metrics(whole)
    assert metrics["num_images"] == NUM_IMAGES and metrics["timed_images"] == NUM_IMAGES - BATCH_SIZE
    assert 0 < metrics["sampling_seconds"] < metrics["seconds_per_image"] < 60
    assert metrics["flops_per_image"] == sum(metrics["flops_by_part"].values()) > 1e9
    assert metrics["settings"]["refresh_interval"] == 9
    assert metrics["environment"]["torch"] == torch.__version__
    assert metrics["method"] == "lazymar, num_iter 3, num_sampling_steps 3, start_step 1"
    assert json.loads((whole / "run.json").read_text())["settings"] == metrics["settings"]
    assert np.array(Image.open(whole / "grid.png")).shape == (3 * 66 + 2, 8 * 66 + 2, 3)


def test_several_seeds_and_cfg_scales_make_a_run_each_with_means_and_a_table(tmp_path, command, capsys, monkeypatch):
    folder, few = tmp_path / "runs", ["--num_images", 4]
    assert run(command(folder, *few, "--cfg", "5,1.5", "--seed", "0,3")) == 0
    fids = [read_metrics(folder / f"cfg-5-seed-{seed}")["frechet_inception_distance"] for seed in (0, 3)]
    written = json.loads((folder / "cfgs.json").read_text())
    summary, other = written["cfgs"]
    assert (written["seeds"], written["num_images"], summary["cfg"], other["cfg"]) == ([0, 3], 4, 5, 1.5)
    assert summary["mean"]["frechet_inception_distance"] == pytest.approx(np.mean(fids))
    assert summary["std"]["frechet_inception_distance"] == pytest.approx(np.std(fids, ddof=1)) != 0
    table = capsys.readouterr().out.rpartition("seeds 0, 3, 4 images each")[2].splitlines()
    assert table[1].split() == ["cfg", "5", "1.5"] and any(
        line.startswith("frechet_inception_distance ") for line in table
    )

    assert run(command(tmp_path / "seed-3", *few, "--seed", 3)) == 0
    assert images(folder / "cfg-5-seed-3") == images(tmp_path / "seed-3") != images(folder / "cfg-5-seed-0")
    monkeypatch.setattr(program.Sampler, "__call__", None)
    assert run(command(folder, *few, "--cfg", "1.5,5", "--seed", "3,0")) == 0  # all images are there


def test_chosen_classes_take_turns(tmp_path, command):
    assert run(command(tmp_path / "run", "--class_labels", "1,1,9", "--num_images", 3)) == 0
    assert len(set(images(tmp_path / "run").values())) == 3 and not scores(tmp_path / "run")
    assert np.array(Image.open(tmp_path / "run" / "grid.png")).shape == (66 + 2, 3 * 66 + 2, 3)


def test_another_number_of_classes_needs_weights_for_it(tmp_path, command):
    save_safetensors(create_model("mar_tiny", class_num=3).state_dict(), tmp_path / "three.safetensors", {})
    flags = ["--class_num", 3, "--resume", tmp_path / "three.safetensors", "--num_images", 4, "--no-score"]
    assert run(command(tmp_path / "run", *flags)) == 0 and len(images(tmp_path / "run")) == 4


# Nothing is lost


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path, command, slow_whole):
    """At any time from the first moment on, and soon after a batch was written; `soak.py` does so for hours."""
    folder, chance, finished = tmp_path / "run", random.Random(0), 0
    for world_size, longest in ((1, 2), (2, 0.3), (1, 0.3)):
        job = Ranks(command(folder, *SLOW), tmp_path / "log", world_size)
        while longest < 1 and records(folder) == finished and job.is_alive():
            time.sleep(0.02)
        time.sleep(chance.uniform(0, longest))
        finished = records(folder)
        job.kill()
        assert finished <= records(folder), "a finished batch was lost"
        assert images(folder).items() <= images(slow_whole).items(), "a file was half-written"
    job = Ranks(command(folder, *SLOW), tmp_path / "log")
    assert job.wait() == [0], job.log.read_text()
    assert_same(folder, slow_whole)


def test_what_was_damaged_is_made_again_and_nothing_else(copy, command, whole):
    (copy / "images" / "000003.png").unlink()
    os.truncate(copy / "images" / "000010.png", 100)
    content = bytearray((copy / "batches" / "000014.npz").read_bytes())
    content[content.index(np.load(copy / "batches" / "000014.npz")["features"].tobytes())] ^= 1  # one bit
    (copy / "batches" / "000014.npz").write_bytes(content)
    (copy / "batches" / "000018.npz").unlink()
    (copy / "images" / ".000001.png.1.partial").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("0*.*")}
    assert run(command(copy)) == 0
    assert_same(copy, whole)
    changed = {path.stem for path in copy.rglob("0*.*") if path.stat().st_mtime_ns != times.get(path)}
    assert changed == {f"{index:06d}" for first in (2, 10, 14, 18) for index in (first, first + 1)}


def test_a_run_without_scores_is_refused_with_them_and_scored_by_score_py(tmp_path, command, capsys, whole):
    assert run(command(tmp_path / "run", "--no-score", "--statistics", "nowhere")) == 0
    assert images(tmp_path / "run") == images(whole) and not scores(tmp_path / "run")
    assert run(command(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert "scored by None there, FashionClassifier" in message and "score.py evaluate" in message
    reference = ["--reference", PRESETS["mar_tiny"].statistics_path, "--json", tmp_path / "scores.json"]
    score_flags = ["evaluate", tmp_path / "run", "--features", "fashion", "--device", "cpu", *reference]
    assert score.main([*map(str, score_flags)]) == 0
    fid = json.loads((tmp_path / "scores.json").read_text())["frechet_inception_distance"]
    assert fid == pytest.approx(scores(whole)["frechet_inception_distance"], rel=1e-4)


def test_a_finished_run_gets_further_scores_without_sampling(copy, command, monkeypatch):
    monkeypatch.setattr(program.Sampler, "__call__", None)
    monkeypatch.setattr(program, "map_images", None)
    assert run(command(copy, "--standard_errors")) == 0
    assert read_metrics(copy)["standard_errors"]["frechet_inception_distance"] > 0


def test_without_images_only_those_of_the_grid_are_written(tmp_path, command, monkeypatch, whole):
    monkeypatch.setattr("util.run.GRID_IMAGES", 3)
    assert run(command(tmp_path / "run", "--no_save_images")) == 0
    assert images(tmp_path / "run").keys() == {"000000.png", "000001.png", "000002.png"}
    assert scores(tmp_path / "run") == scores(whole)


def test_other_settings_and_weights_are_refused_unless_the_run_is_given_up(copy, command, capsys, tmp_path, whole):
    save_safetensors(create_model("mar_tiny").state_dict(), tmp_path / "other.safetensors", {})
    assert run(command(copy, "--resume", tmp_path / "other.safetensors")) == 2
    assert "sha256 of mar_tiny" in capsys.readouterr().err
    others = ["--seed", 1, "--start_step", 3]
    assert run(command(copy, *others)) == 2
    message = capsys.readouterr().err
    assert "seed 0 there, 1 now; start_step 1 there, 3 now" in message and "--overwrite" in message
    assert run(command(copy, *others, "--overwrite", "--resume", PRESETS["mar_tiny"].vae_path)) == 2
    assert "does not fit mar_tiny" in capsys.readouterr().err
    assert_same(copy, whole)
    assert run(command(copy, *others, "--overwrite")) == 0
    assert len(images(copy)) == NUM_IMAGES and not set(images(copy).values()) & set(images(whole).values())


def test_a_run_goes_on_on_another_processor_unless_the_sampler_changed(copy, command, capsys, monkeypatch):
    monkeypatch.setattr("util.machine.processor_name", lambda device: "another")
    assert run(command(copy)) == 0
    assert "may be rounded differently (processor " in capsys.readouterr().out
    monkeypatch.setattr("util.options.SAMPLER_VERSION", 99)
    assert run(command(copy)) == 2
    assert "there, 99 now" in capsys.readouterr().err


def test_a_signal_to_one_rank_stops_all_when_their_work_is_safe(tmp_path, command, slow_whole):
    folder = tmp_path / "run"
    job = Ranks(command(folder, *SLOW, "--num_images", 5000), tmp_path / "log", 2)  # more than can be done before it
    wait_until(lambda: records(folder) > 1, job.is_alive)
    os.kill(job.processes[1].pid, signal.SIGTERM)
    assert job.wait() == [143] * 2
    log, made, whole = job.log.read_text(), images(folder), images(slow_whole)
    assert log.count("stopped by SIGTERM; the same command goes on") == 1 and "Traceback" not in log
    assert len(made) == BATCH_SIZE * records(folder) > BATCH_SIZE, "work in hand was not finished"
    assert all(made[name] == whole[name] for name in made.keys() & whole.keys())


def test_a_folder_in_use_is_refused(tmp_path, command, capsys):
    # One batch takes minutes.
    endless = command(tmp_path / "run", "--eval_bsz", NUM_IMAGES, "--num_iter", 256, "--num_sampling_steps", 1000)
    job = Ranks(endless, tmp_path / "log")
    wait_until(lambda: job.log.exists() and " 0/24 [" in job.log.read_text(), job.is_alive)
    assert run(endless) == 2
    assert "is in use by another launch" in capsys.readouterr().err
    job.kill()


def test_two_machines_with_restarts_finish_after_a_rank_died(tmp_path, command, slow_whole):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = f"--nnodes=2 --max_restarts=2 --rdzv_backend=c10d --rdzv_id=test --rdzv_endpoint=localhost:{free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", *flags.split(), str(ROOT / "eval.py")]
    with log.open("a") as output:
        start = partial(subprocess.Popen, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
        agents = [start([*torchrun, *command(folder, *SLOW)]) for _ in range(2)]
    wait_until(lambda: records(folder) > 1, lambda: all(agent.poll() is None for agent in agents))
    listing = ["ps", "-o", "pid=", "--ppid", str(agents[1].pid)]
    os.kill(int(subprocess.run(listing, capture_output=True, text=True).stdout.split()[-1]), signal.SIGKILL)
    assert records(folder) < len(images(slow_whole)) // BATCH_SIZE, "the job was over before its rank died"
    assert [agent.wait() for agent in agents] == [0, 0], log.read_text()
    assert_same(folder, slow_whole)
    assert log.read_text().count("images are there") == 2, "the job was not started again"


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path, command, capsys, monkeypatch, whole):
    folder, sample, limits = tmp_path / "run", program.Sampler.__call__, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail_after_some_batches(*arguments):
        if records(folder) > 3:  # no file may have more bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return sample(*arguments)

    monkeypatch.setattr(program.Sampler, "__call__", fail_after_some_batches)
    try:
        assert run(command(folder)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert f"cannot write to {folder}" in message and "Traceback" not in message
    assert 3 < records(folder) < NUM_IMAGES // BATCH_SIZE and images(folder).items() <= images(whole).items()
    monkeypatch.undo()
    assert run(command(folder)) == 0
    assert_same(folder, whole)


def test_a_batch_that_runs_out_of_memory_is_made_again_without_graphs(tmp_path, command, capsys, monkeypatch, whole):
    """Stands in for a GPU's memory: one batch fails once in the sampler and one in the VAE, then all do."""
    dropped, drop = [], program.Sampler.drop_graphs
    monkeypatch.setattr(program.Sampler, "drop_graphs", lambda sampler: dropped.append(drop(sampler)))

    def fail(owner: type, name: str, failing: Container[int]) -> None:
        calls, function = itertools.count(1), getattr(owner, name)

        def call(*arguments):
            if next(calls) in failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return function(*arguments)

        monkeypatch.setattr(owner, name, call)

    fail(program.Sampler, "__call__", [2])
    fail(program.MARPipeline, "decode", [4])
    assert run(command(tmp_path / "run")) == 0
    assert len(dropped) == 2 and "without CUDA graphs" in capsys.readouterr().out
    assert_same(tmp_path / "run", whole)
    fail(program.Sampler, "__call__", range(100))
    assert run(command(tmp_path / "other")) == 2
    advice = "add --no-cuda_graphs, or if that is not enough give --eval_bsz 1; either continues in the"
    assert advice in capsys.readouterr().err


# Bad input


@pytest.fixture
def bad(tmp_path) -> Path:
    """A folder of things that cannot be used."""
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_text("precious")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model mar_huge --no-score --eval_bsz 1", "mar_huge"),
        ("--precision_recall", "fashion_classifier_stats.npz"),
        ("--resume {bad}/file", "file"),
        ("--vae_path nowhere", "nowhere"),
        ("--statistics {bad}/wrong.npz", "wrong.npz"),
        ("--output_dir {bad}/file", "--output_dir"),
        ("--output_dir {bad}/photos --overwrite", "holds files, but no run of eval.py"),
        ("--output_dir /proc/run", "cannot write to --output_dir /proc/run"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, message, bad, command, capsys):
    assert run(command(bad / "run", *flags.format(bad=bad).split())) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error, error
    assert not list((bad / "run").rglob("*.npz"))
    assert (bad / "photos" / "holiday.png").read_text() == "precious"


def test_latents_that_are_not_finite_are_named(tmp_path, command, capsys, monkeypatch):
    sample = program.Sampler.__call__

    def break_seven(sampler, labels, *arguments):
        return sample(sampler, labels, *arguments).masked_fill((labels == 7).view(-1, 1, 1, 1), float("nan"))

    monkeypatch.setattr(program.Sampler, "__call__", break_seven)
    assert run(command(tmp_path / "run", "--eval_bsz", 20)) == 2
    assert "the latents of images 7, 17 are not finite" in capsys.readouterr().err


def test_overwriting_at_each_restart_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--overwrite would delete the images at each restart by torchrun"):
        parse_options(["--overwrite"])


def test_a_fault_of_several_ranks_is_printed_once(tmp_path, command):
    job = Ranks(command(tmp_path / "run", "--num_iter", "0"), tmp_path / "log", 2)
    assert job.wait() == [2, 2]
    assert job.log.read_text().count("--num_iter must be") == 1
