"""eval.py: the same images whoever makes them, nothing lost whatever happens, and one clear sentence for bad input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from ranks import Ranks, free_port, make_weights

import eval as program
from models import PRESETS, create_model, find_method
from score import main as score_folder
from util.job.processes import launch
from util.runs.options import check, parse_options
from util.scoring.scores import load_extractor
from util.weights.checkpoint import save_safetensors

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
NUM_IMAGES, BATCH_SIZE = 24, 2
SLOW = ["--num_images", 40, "--num_iter", 16, "--num_sampling_steps", 8]  # long enough to be disturbed


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
    return launch(lambda job: program.evaluate(job, parse_options("", arguments)))


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


def scores(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name.startswith(("fid", "isc"))}


def assert_same(folder: Path, whole: Path) -> None:
    assert images(folder) == images(whole) and len(images(whole)) >= NUM_IMAGES
    assert scores(folder) == scores(whole) and len(scores(whole)) == 3
    assert not list(folder.rglob("*.partial"))


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def records(folder: Path) -> int:
    return len(list((folder / "batches").glob("*.npz")))


# The same images


@pytest.mark.parametrize("world_size", [2, 3])
def test_images_and_scores_are_the_same_in_every_world(world_size, tmp_path, command, whole):
    job = Ranks(command(tmp_path / "run"), tmp_path / "log", world_size)
    assert job.wait() == [0] * world_size, job.log.read_text()
    assert_same(tmp_path / "run", whole)
    log = job.log.read_text()
    made = [int(line.split()[2]) for line in log.splitlines() if line.startswith("rank ")]
    assert len(made) == world_size and sum(made) == NUM_IMAGES, log


def test_another_batch_size_changes_a_pixel_by_one_at_most(tmp_path, command, whole):
    assert run(command(tmp_path / "run", "--eval_bsz", 5)) == 0
    pixels = [
        np.stack([np.array(Image.open(path)).astype(int) for path in sorted((folder / "images").iterdir())])
        for folder in (whole, tmp_path / "run")
    ]
    difference = abs(pixels[0] - pixels[1])
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert pixels[0].std() > 1, "the images are blank, so that they show nothing"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["timed_images"] == 3 * 5  # neither the first batch nor the last, the first of its size


def test_scores_are_those_of_torch_fidelity_on_the_folder(whole, tmp_path):
    isc = torch_fidelity.calculate_metrics(
        input1=str(whole / "images"), feature_extractor="fashion-classifier", isc=True, cuda=False, verbose=False
    )
    assert scores(whole)["isc_fashion_classifier_mean"] == pytest.approx(isc["inception_score_mean"], rel=1e-6)
    assert scores(whole)["isc_fashion_classifier_std"] == pytest.approx(isc["inception_score_std"], rel=1e-4)
    statistics, report = str(ROOT / PRESETS["mar_tiny"].statistics_path), tmp_path / "report.json"
    arguments = ["--features", "fashion", "--statistics", statistics, "--json", str(report)]
    assert score_folder(["evaluate", str(whole / "images"), *arguments]) == 0
    fid = json.loads(report.read_text())["fid_fashion_classifier"]
    assert scores(whole)["fid_fashion_classifier"] == pytest.approx(fid, rel=1e-6)
    # The features are those of the PNGs.
    record = np.load(whole / "batches" / "000003.npz")
    pngs = [np.array(Image.open(whole / "images" / f"{index:06d}.png")) for index in (6, 7)]
    features = [load_extractor("fashion")(torch.from_numpy(png).permute(2, 0, 1)[None])[0] for png in pngs]
    np.testing.assert_allclose(record["features"], torch.cat(features).numpy(), rtol=1e-5, atol=1e-6)


def test_metrics_tell_what_was_measured(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["num_images"] == NUM_IMAGES and metrics["timed_images"] == NUM_IMAGES - BATCH_SIZE
    assert 0 < metrics["sampling_seconds"] < metrics["seconds_per_image"] < 60
    assert metrics["flops_per_image"] == sum(metrics["flops_by_part"].values()) > 1e9
    assert (
        metrics["settings"]["cache"]["refresh_interval"] == 9 and metrics["environment"]["torch"] == torch.__version__
    )
    assert metrics["method"] == "lazymar, num_iter 3, num_sampling_steps 3, start_step 1"
    assert sum(metrics["images_by_worker"].values()) == NUM_IMAGES
    with Image.open(whole / "grid.png") as grid:
        assert grid.size == (8 * 66 + 2, 3 * 66 + 2)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, whole) -> Path:
    """A reference file with everything: of a finished run's own images, noise added."""
    folder = tmp_path_factory.mktemp("reference")
    chance = np.random.default_rng(0)
    for path in (whole / "images").glob("*.png"):
        pixels = np.array(Image.open(path)) // 2 + chance.integers(0, 90, (32, 32, 3), np.uint8)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / path.name)
    flags = ["--keep_features", "20", "--fd_dinov2", "--features", "fashion", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load", random_dinov2)
        assert score_folder(["statistics", str(folder), "--output", str(folder / "reference.npz"), *flags]) == 0
    return folder / "reference.npz"


def random_dinov2(*_: str) -> torch.nn.Module:
    """A network with random weights in the place of what PyTorch's hub would fetch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 14, 14), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()
        )


MORE_SCORES = ["--precision_recall", "--kid", "--standard_errors"]


def test_more_scores_come_from_what_a_finished_run_has_stored(copy, command, monkeypatch, reference, tmp_path):
    monkeypatch.setattr(program.Sampler, "__call__", None)
    monkeypatch.setattr(program, "map_images", None)  # no image is made, read or scored again
    assert run(command(copy, "--statistics", reference, *MORE_SCORES)) == 0
    report, images = tmp_path / "report.json", str(copy / "images")
    flags = ["--features", "fashion", "--reference", str(reference), "--json", str(report), "--device", "cpu"]
    assert score_folder(["evaluate", images, *MORE_SCORES[:2], *flags]) == 0
    found, expected = (json.loads(path.read_text()) for path in (copy / "metrics.json", report))
    for name in ("precision", "recall", "kid"):
        key = f"{name}_fashion_classifier{'_mean' * (name == 'kid')}"
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
        assert found["standard_errors"][key] >= 0
    assert found["standard_errors"]["fid_fashion_classifier"] > 0


def test_a_second_extractor_stores_its_features_in_the_same_pass(
    tmp_path, copy, command, monkeypatch, reference, whole
):
    monkeypatch.setattr(torch.hub, "load", random_dinov2)
    flags = ["--statistics", reference, "--fd_dinov2"]
    assert run(command(tmp_path / "run", *flags)) == 0
    assert images(tmp_path / "run") == images(whole)
    monkeypatch.setattr(program.Sampler, "__call__", None)
    assert run(command(copy, *flags)) == 0  # those that a finished run lacks come from its PNGs
    for number in range(NUM_IMAGES // BATCH_SIZE):
        records = [np.load(folder / "batches" / f"{number:06d}.npz") for folder in (tmp_path / "run", copy, whole)]
        assert records[0]["dinov2"].shape == (BATCH_SIZE, 1024) and "dinov2" not in records[2]
        np.testing.assert_array_equal(records[0]["dinov2"], records[1]["dinov2"])
        np.testing.assert_array_equal(records[1]["features"], records[2]["features"])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "run", copy)]
    assert metrics[0]["fd_dinov2"] == metrics[1]["fd_dinov2"] > 0
    monkeypatch.setattr(program, "map_images", None)
    assert run(command(copy)) == 0  # the run is still whole without the flag
    assert_same(copy, whole)


def test_several_seeds_make_a_run_each_with_mean_and_spread(tmp_path, command, capsys, monkeypatch, whole):
    folder = tmp_path / "runs"
    assert run(command(folder, "--seed", "0,3")) == 0
    assert images(folder / "seed-0") == images(whole) != images(folder / "seed-3")
    both = [json.loads((folder / f"seed-{seed}" / "metrics.json").read_text()) for seed in (0, 3)]
    summary = json.loads((folder / "seeds.json").read_text())
    fids = [metrics["fid_fashion_classifier"] for metrics in both]
    assert summary["seeds"] == [0, 3] and summary["num_images"] == NUM_IMAGES
    assert summary["mean"]["fid_fashion_classifier"] == pytest.approx(np.mean(fids))
    assert summary["spread"]["fid_fashion_classifier"] == pytest.approx(np.std(fids, ddof=1))
    assert "seeds 0, 3, 24 images each: mean ± standard deviation" in capsys.readouterr().out
    # A command that was cut off goes on, and a third seed may come later.
    (folder / "seeds.json").unlink()
    (folder / "seed-3" / "batches" / "000005.npz").unlink()
    assert run(command(folder, "--seed", "0,3")) == 0
    assert json.loads((folder / "seeds.json").read_text())["mean"]["fid_fashion_classifier"] == np.mean(fids)
    assert run(command(folder / "seed-0", "--seed", "0,3")) == 2
    assert "holds the run of a single seed" in capsys.readouterr().err
    monkeypatch.setattr(program.Sampler, "__call__", None)
    assert run(command(folder, "--seed", "3,0")) == 0
    # Every folder is checked before the first run.
    assert run(command(folder, "--seed", "7,0", "--start_step", "2")) == 2
    assert "seed-0 holds a run with other settings" in capsys.readouterr().err and not (folder / "seed-7").exists()


# Nothing is lost


def test_a_run_killed_ten_times_ends_with_the_same_bytes(tmp_path, command, slow_whole):
    folder, chance, finished = tmp_path / "run", random.Random(0), [0]
    for attempt in range(10):
        job = Ranks(command(folder, *SLOW), tmp_path / "log", 1 + attempt % 2)
        # Some kills come at any time from the first moment on, the others soon after a batch was written.
        deadline = time.monotonic() + (20 if attempt % 3 else 0)
        while records(folder) == finished[-1] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3 if attempt % 3 else 2))
        finished.append(records(folder))
        job.kill()
        assert finished[-1] <= records(folder), "a finished batch was lost"
        assert images(folder).items() <= images(slow_whole).items(), "a file was half-written"
    assert len(set(finished)) > 4 and finished[-2] < len(images(slow_whole)) // BATCH_SIZE, finished
    job = Ranks(command(folder, *SLOW), tmp_path / "log")
    assert job.wait() == [0], job.log.read_text()
    assert_same(folder, slow_whole)


def test_what_was_damaged_is_made_again_and_nothing_else(copy, command, whole):
    (copy / "images" / "000003.png").unlink()
    os.truncate(copy / "images" / "000010.png", 100)
    with open(copy / "images" / "000011.png", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.truncate(copy / "batches" / "000007.npz", 500)
    (copy / "batches" / "000009.npz").unlink()
    (copy / "images" / ".000001.png.1.partial").write_bytes(b"half")
    damaged = {"000003.png", "000010.png", "000011.png", "000007.npz", "000009.npz", "metrics.json", "grid.png"}
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*")}
    assert run(command(copy)) == 0
    assert_same(copy, whole)
    assert {path.name for path in copy.rglob("*.*") if path.stat().st_mtime_ns != times.get(path)} == damaged


def test_a_run_of_a_composition_goes_on_as_it_began(tmp_path, command, capsys):
    few = ["--num_images", 4, "--method", "lazymar+gtr", "--num_iter", "3,2,1", "--detailed_tokens", "0.1:4"]
    arguments = command(tmp_path / "run", *few, "--num_sampling_steps", "4:2:generation")
    assert run(arguments) == 0
    assert "method lazymar+gtr, num_iter 3,2,1, num_sampling_steps 4:2:generation" in capsys.readouterr().out
    made = images(tmp_path / "run")
    for lost in ("images/000003.png", "batches/000001.npz", "metrics.json"):
        (tmp_path / "run" / lost).unlink()
    assert run(arguments) == 0 and images(tmp_path / "run") == made and len(made) == 4
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["settings"]["num_iter"] == [3, 2, 1] and metrics["settings"]["num_stages"] == 3
    assert run([*arguments, "--detailed_tokens", "0.1:3"]) == 2
    assert "detailed_tokens 0.1:4 there, 0.1:3 now" in capsys.readouterr().err


def test_a_finished_run_samples_nothing(copy, command, monkeypatch, whole):
    monkeypatch.setattr(program.Sampler, "__call__", None)
    (copy / "metrics.json").unlink()
    assert run(command(copy)) == 0
    assert_same(copy, whole)


def test_scores_come_later_from_the_images(tmp_path, command, monkeypatch, whole):
    assert run(command(tmp_path / "run", "--no-score", "--statistics", "nowhere")) == 0
    assert not scores(tmp_path / "run")
    monkeypatch.setattr(program.Sampler, "__call__", None)
    assert run(command(tmp_path / "run")) == 0
    assert_same(tmp_path / "run", whole)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["timed_images"] == NUM_IMAGES - BATCH_SIZE


def test_without_images_only_those_of_the_grid_are_written(tmp_path, command, monkeypatch, whole):
    monkeypatch.setattr("util.runs.run.GRID_IMAGES", 3)
    assert run(command(tmp_path / "run", "--no_save_images")) == 0
    assert images(tmp_path / "run").keys() == {"000000.png", "000001.png", "000002.png"}
    assert scores(tmp_path / "run") == scores(whole)


def test_chosen_classes_make_one_image_each(tmp_path, command, whole):
    assert run(command(tmp_path / "run", "--class_labels", "1,1,9")) == 0
    made = images(tmp_path / "run")
    assert len(set(made.values())) == 3 and not scores(tmp_path / "run")
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.size == (3 * 66 + 2, 66 + 2)


def test_other_settings_are_refused_unless_the_run_is_given_up(copy, command, capsys, whole):
    assert run(command(copy, "--seed", 1, "--start_step", 3)) == 2
    message = capsys.readouterr().err
    assert "seed 0 there, 1 now; cache.start_step 1 there, 3 now" in message and "--overwrite" in message
    assert_same(copy, whole)
    assert run(command(copy, "--seed", 1, "--start_step", 3, "--overwrite")) == 0
    assert len(images(copy)) == NUM_IMAGES and not set(images(copy).values()) & set(images(whole).values())


def test_a_run_goes_on_after_the_code_was_edited(copy, command, capsys, monkeypatch, whole):
    (copy / "images" / "000003.png").unlink()
    monkeypatch.setattr("util.machine.code_digest", lambda: "edited")
    assert run(command(copy)) == 0
    assert "may be rounded differently (code " in capsys.readouterr().out
    assert_same(copy, whole)
    monkeypatch.setattr("util.runs.options.SAMPLER_VERSION", 2)
    assert run(command(copy)) == 2
    assert "a run of version 1 of the sampler, and version 2 makes other images" in capsys.readouterr().err


def test_a_restart_by_torchrun_does_not_overwrite_again(copy, command, monkeypatch, whole, capsys):
    again = command(copy, "--overwrite")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
    assert run(again) == 0
    monkeypatch.setattr(program.Sampler, "__call__", None)
    capsys.readouterr()
    assert run(again) == 0
    assert "give it another --rdzv_id than this launch" in capsys.readouterr().out
    assert_same(copy, whole)
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    (copy / "images" / "000000.png").write_bytes(b"not an image of this run")
    assert run([*again, "--no-score"]) == 0
    assert images(copy) == images(whole)


def test_other_weights_are_refused(copy, command, capsys, tmp_path, weights):
    other = tmp_path / "other.safetensors"
    save_safetensors(create_model("mar_tiny").state_dict(), other, {})
    assert run(command(copy, "--resume", other)) == 2
    assert "sha256 of mar_tiny" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_when_its_work_is_safe(number, tmp_path, command, slow_whole):
    folder = tmp_path / "run"
    job = Ranks(command(folder, *SLOW), tmp_path / "log", 2)
    wait_until(lambda: records(folder) > 1)
    os.kill(job.processes[1].pid, number)  # one rank passes it on
    assert job.wait(30) == [128 + number] * 2
    log = job.log.read_text()
    assert f"stopped by {number.name}; to go on: torchrun" in log and "--lazy_mar" in log and "Traceback" not in log
    assert 1 < records(folder) < len(images(slow_whole)) // BATCH_SIZE, "the signal came too late to show anything"
    assert len(images(folder)) == BATCH_SIZE * records(folder), "work in flight was not finished"
    assert run(command(folder, *SLOW)) == 0
    assert_same(folder, slow_whole)


def test_a_second_signal_stops_at_once(tmp_path, command):
    # One batch takes minutes, so only the second signal can be what ends it.
    job = Ranks(
        command(tmp_path / "run", "--eval_bsz", NUM_IMAGES, "--num_iter", 256, "--num_sampling_steps", 1000),
        tmp_path / "log",
    )
    wait_until(lambda: "0 of 24 images are there" in job.log.read_text() if job.log.exists() else False)
    wait_until(lambda: "s per image, about " in job.log.read_text())  # it moves by steps
    job.signal(signal.SIGTERM)
    time.sleep(1.5)
    assert job.processes[0].is_alive()
    job.signal(signal.SIGTERM)
    assert job.wait(5) == [143]


def torchrun(log: Path, *flags: str, arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(ROOT / "eval.py"), *arguments]
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def workers(agent: subprocess.Popen) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listing.split()]


def test_a_dead_rank_ends_the_job_and_two_machines_with_restarts_finish_it(tmp_path, command, slow_whole):
    folder, log = tmp_path / "run", tmp_path / "log"
    agent = torchrun(log, "--nproc_per_node=2", arguments=command(folder, *SLOW))
    wait_until(lambda: records(folder) > 1)
    os.kill(workers(agent)[-1], signal.SIGKILL)
    assert agent.wait(30) != 0
    assert records(folder) < len(images(slow_whole)) // BATCH_SIZE, "the job was over before its rank died"

    endpoint = f"--rdzv_endpoint=localhost:{free_port()}"
    flags = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=2", "--rdzv_backend=c10d", "--rdzv_id=test", endpoint]
    before = records(folder)
    agents = [torchrun(log, *flags, arguments=command(folder, *SLOW)) for _ in range(2)]
    wait_until(lambda: records(folder) > before)
    os.kill(workers(agents[1])[-1], signal.SIGKILL)
    assert [agent.wait(90) for agent in agents] == [0, 0], log.read_text()
    assert_same(folder, slow_whole)


@contextlib.contextmanager
def small_disk(folder: Path):
    """A disk of 4 MB, and functions that leave it so many bytes, and all again.

    Where mounting one takes privileges that we lack, the size of a file is limited instead.
    """
    folder.mkdir()
    ballast, limits = folder / "ballast", resource.getrlimit(resource.RLIMIT_FSIZE)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode == 0:

        def fill(left: int) -> None:
            with contextlib.suppress(OSError):  # a writer was faster
                ballast.write_bytes(bytes(shutil.disk_usage(folder).free - left))

        try:
            yield fill, ballast.unlink
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        try:
            yield (
                lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1])),
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_clean_and_the_run_goes_on(tmp_path, command, capsys, monkeypatch, whole):
    with small_disk(tmp_path / "disk") as (fill, make_room):
        folder, sample, filled = tmp_path / "disk" / "run", program.Sampler.__call__, []

        def fill_after_some_batches(*arguments, **options):
            if records(folder) > 3 and not filled:
                filled.append(fill(6_000))
            return sample(*arguments, **options)

        monkeypatch.setattr(program.Sampler, "__call__", fill_after_some_batches)
        assert run(command(folder)) == 2
        message = capsys.readouterr().err
        assert "cannot write to" in message and "nothing written before is damaged" in message
        assert "Traceback" not in message
        assert 3 < records(folder) < NUM_IMAGES // BATCH_SIZE
        assert images(folder).items() <= images(whole).items()
        for path in (folder / "batches").glob("*.npz"):
            assert len(np.load(path)["features"]) == BATCH_SIZE
        make_room()
        monkeypatch.undo()
        assert run(command(folder)) == 0
        assert_same(folder, whole)


def test_a_folder_that_goes_is_not_made_again(tmp_path, command, capsys, monkeypatch):
    folder, sample = tmp_path / "run", program.Sampler.__call__

    def remove_after_some_batches(*arguments, **options):
        if records(folder) > 2:
            folder.rename(tmp_path / "elsewhere")
        return sample(*arguments, **options)

    monkeypatch.setattr(program.Sampler, "__call__", remove_after_some_batches)
    assert run(command(folder)) == 2
    assert f"cannot write to {folder}" in capsys.readouterr().err
    assert not list(folder.rglob("*.npz"))


# Bad input


def weights_with_nan(tmp_path: Path) -> Path:
    model = create_model("mar_tiny")
    model.class_emb.weight.data[7] = float("nan")
    save_safetensors(model.state_dict(), tmp_path / "nan.safetensors", {})
    return tmp_path / "nan.safetensors"


def empty_statistics(tmp_path: Path) -> Path:
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    return tmp_path / "wrong.npz"


def text_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("no folder")
    return tmp_path / "file"


def foreign_folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "photos" / "images" / "holiday.png").write_text("precious")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "mar_giant"], "--model: invalid choice: 'mar_giant'"),
        (["--model", "mar_huge", "--no-score"], "is a mar_tiny checkpoint, not mar_huge"),
        (["--frobnicate"], "--frobnicate"),
        (["--num_iter", "0"], "--num_iter must be 1 to the number of tokens, 256, not 0"),
        (["--num_iter", "257"], "--num_iter"),
        (["--num_iter", "many"], "--num_iter: invalid N,... value: 'many'"),
        (["--cfg", "0.5"], "--cfg must be a finite number of at least 1"),
        (["--cfg", "nan"], "--cfg"),
        (["--cfg_schedule", "cosine"], "--cfg_schedule"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--num_sampling_steps", "1"], "--num_sampling_steps must be 2 to 1000"),
        (["--num_sampling_steps", "1001"], "--num_sampling_steps"),
        (["--eval_bsz", "0"], "--eval_bsz must be at least 1"),
        (["--eval_bsz", "99999999"], "--eval_bsz 99999999 does not fit"),
        (["--num_images", "0"], "--num_images must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", "0,-1"], "--seed must be at least 0, not -1"),
        (["--seed", "2,2"], "--seed takes one seed or several different ones, not 2,2"),
        (["--seed", ","], "--seed takes one seed or several different ones, not none"),
        (["--precision_recall"], "fashion_classifier_stats.npz holds mean and covariance alone"),
        (["--kid"], "--kid needs features of the reference images"),
        (["--fd_dinov2"], "--fd_dinov2 needs DINOv2's mean and covariance of the reference images"),
        (["--precision_recall", "--num_images", "3"], "--precision_recall takes at least 4 images"),
        (["--standard_errors", "--num_images", "9"], "--standard_errors takes at least 10 images"),
        (["--kid", "--no-score"], "--kid has no use with --no-score"),
        (["--kid", "--class_labels", "3"], "--kid has no use with --class_labels"),
        (["--class_labels", "3,10"], "--class_labels must be classes of mar_tiny, from 0 to 9"),
        (["--class_labels", "-1"], "--class_labels"),
        (["--class_labels", ""], "--class_labels"),
        (["--class_labels", "cat"], "--class_labels"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--start_step", "-1"], "--start_step must be at least 0"),
        (["--kept_fractions", "0:2"], "--kept_fractions"),
        (["--kept_fractions", "half"], "--kept_fractions"),
        (["--prune_layer", "99"], "--prune_layer must be below 8"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", text_file], "file is truncated, damaged or no checkpoint"),
        (["--resume", weights_with_nan], "the latents of images 7, 17 are not finite"),
        (["--vae_path", "nowhere"], "nowhere"),
        (["--vae_path", weights_with_nan], "does not fit the VAE"),
        (["--statistics", "nowhere"], "nowhere"),
        (["--statistics", empty_statistics], "mu [3]"),
        (["--inception_weights", "nowhere"], "--inception_weights"),
        (["--output_dir", text_file], "--output_dir"),
        (["--output_dir", foreign_folder], "holds files, but no run of eval.py"),
        (["--output_dir", foreign_folder, "--overwrite"], "holds files, but no run of eval.py"),
        (["--output_dir", "/proc/run"], "cannot write to --output_dir /proc/run"),
    ],
    ids=lambda value: " ".join(getattr(part, "__name__", part) for part in value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(flags, message, tmp_path, command, capsys):
    flags = [flag(tmp_path) if callable(flag) else flag for flag in flags]
    assert run(command(tmp_path / "run", *flags, *["--eval_bsz", 20] * ("nan" in str(flags)))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error, error
    assert not list(tmp_path.rglob("*.npz")) or "wrong.npz" in str(flags)
    assert not (tmp_path / "photos").exists() or (tmp_path / "photos/images/holiday.png").read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
def test_cuda_is_refused_where_there_is_none(tmp_path, command, capsys):
    assert run(command(tmp_path / "run", "--device", "cuda")) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_a_policy_needs_lazy_mar(tmp_path, weights, capsys):
    assert run([*weights, "--head_cache"]) == 2
    assert "--head_cache is a setting of LazyMAR: give --lazy_mar too" in capsys.readouterr().err


def test_running_out_of_memory_names_the_batch_size_to_try(tmp_path, command, capsys, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(program.Sampler, "__call__", out_of_memory)
    assert run(command(tmp_path / "run", "--eval_bsz", 24)) == 2
    assert "try --eval_bsz 12" in capsys.readouterr().err
    # The folder holds nothing that other settings could spoil.
    monkeypatch.undo()
    assert run(command(tmp_path / "run", "--eval_bsz", 12)) == 0


def test_a_fault_of_one_rank_is_printed_once_and_ends_all(tmp_path, command):
    job = Ranks(command(tmp_path / "run", "--num_iter", "0"), tmp_path / "log", 2)
    assert job.wait(30) == [2, 2]
    assert job.log.read_text().count("--num_iter must be") == 1


def test_flags_at_random_never_end_in_a_traceback(capsys):
    chance = random.Random(0)
    with pytest.raises(SystemExit):
        parse_options("", ["--help"])
    names = sorted({*re.findall(r"--[a-z][a-z_-]+", capsys.readouterr().out), "--no_score", "--no_token_cache"})
    assert len(names) > 40
    values = [
        "0",
        "-1",
        "1",
        "64",
        "1e9",
        "nan",
        "-inf",
        "",
        " ",
        "mar_tiny",
        "a,b",
        "0:1,5",
        "1,2",
        "💥",
        "9" * 40,
        "/",
        "None",
    ]
    outcomes = {"fine": 0, "refused": 0}
    for _ in range(3000):
        arguments = ["--model", chance.choice(["mar_tiny", "mar_base"])]
        for _ in range(chance.randint(1, 3)):
            arguments += [chance.choice(names), *chance.sample(values, chance.randint(0, 1))]
        try:
            check(parse_options("", arguments))
            outcomes["fine"] += 1
        except program.InputError as error:
            assert str(error).strip()
            outcomes["refused"] += 1
        except SystemExit as end:  # --help
            assert end.code == 0
    assert min(outcomes.values()) > 100, outcomes


def test_the_commands_of_the_paper_are_understood():
    for more in ([], ["--lazy_mar"]):
        options = check(parse_options("", ["--num_images", "50000", "--eval_bsz", "128", "--num_iter", "64", *more]))
        assert (options.model, options.cfg) == ("mar_huge", 3.25)
        assert options.resume == ROOT / "pretrained_models/mar/mar_huge/checkpoint-last.pth"
        assert options.method == find_method("lazymar" if more else "mar")
        assert ("lazy" in options.output_dir.name) == bool(more)
        assert len(options.labels()) == 50_000 and np.ptp(np.bincount(options.labels())) == 0
