"""The folder of a run, and the small parts that eval.py is made of, without any network."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import PRESETS, AutoencoderKL, CachePolicy, Method
from models.lazymar.plan import make_plan
from util.errors import InputError
from util.job.processes import Job, Stopped, launch
from util.job.progress import Progress, StepProgress
from util.job.writers import Writers
from util.runs.folder import Batch, RunFolder, check_folder, open_folder
from util.runs.images import decode, image_grid, map_images, to_uint8
from util.runs.options import parse_options

SETTINGS = {"seed": 0, "class_labels": (1, 2), "cache": {"start_step": 5}}


def make_batch(run: RunFolder, number: int) -> Batch:
    indices, labels = run.indices(number), [index % 3 for index in run.indices(number)]
    chance = np.random.default_rng(number)
    pixels = chance.integers(0, 256, (len(indices), 8, 8, 3), dtype=np.uint8)
    features = np.full((len(indices), 4), number, np.float32)
    return Batch(
        number,
        indices,
        labels,
        pixels=pixels,
        features=features,
        logits=features[:, :2],
        sample_seconds=0.5,
        first=number == 0,
        worker="here",
    )


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run of 7 images in batches of 3, of which two are done."""
    labels = [0, 1, 2, 0, 1, 2, 0]
    run = RunFolder(tmp_path / "run", labels, 3, image_size=8, extractor="name digest", saved=lambda index: True)
    assert open_folder(run.path, SETTINGS, {"torch": "2"}) == SETTINGS
    assert run.unfinished() == [0, 1, 2]
    for number in (0, 2):
        run.save(make_batch(run, number))
    return run


def test_what_was_saved_is_read_again(run):
    assert run.unfinished() == [1]
    open_folder(run.path, SETTINGS, {"torch": "2"})
    assert run.unfinished() == [1]
    batch = run.read(2)
    assert (
        (batch.indices, batch.labels) == (range(6, 7), [0])
        and batch.features.tolist() == [[2, 2, 2, 2]]
        and batch.logits.shape == (1, 2)
    )
    assert (batch.sample_seconds, batch.first, batch.worker) == (0.5, False, "here") and np.isnan(batch.decode_seconds)
    assert np.array_equal(run.read_pixels(2), make_batch(run, 2).pixels)
    assert np.array_equal(run.resume(2).pixels, make_batch(run, 2).pixels) and run.resume(2).features is not None
    assert run.read_pixels(1) is None and run.resume(1) == Batch(1, range(3, 6), [0, 1, 2])


def test_other_settings_are_named(run):
    open_folder(run.path, {"seed": 0}, {})
    with pytest.raises(InputError, match=r"seed 0 there, 1 now; cache\.start_step 5 there, 4 now\)"):
        open_folder(run.path, {**SETTINGS, "seed": 1, "cache": {"start_step": 4}}, {})
    with pytest.raises(InputError, match=r"class_labels \[1, 2\] there, \[2, 1\] now"):
        open_folder(run.path, {**SETTINGS, "class_labels": (2, 1)}, {})


def test_settings_that_take_work_are_compared_last(run):
    def digests() -> dict:
        computed.append(True)
        return {"sha256 of the VAE": "b"}

    computed: list[bool] = []
    content = {"settings": {**SETTINGS, "sha256 of the VAE": "a"}, "environment": {}}
    (run.path / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="seed 0 there, 1 now"):
        open_folder(run.path, {**SETTINGS, "seed": 1}, {}, digests=digests)
    assert not computed
    with pytest.raises(InputError, match="sha256 of the VAE a there, b now"):
        open_folder(run.path, SETTINGS, {}, digests=digests)


def test_a_run_of_another_version_of_the_sampler_is_refused(run):
    with pytest.raises(InputError, match=r"version 1 of the sampler, and version 2 makes other images: finish it with"):
        open_folder(run.path, {**SETTINGS, "sampler_version": 2}, {})
    open_folder(run.path, {**SETTINGS, "sampler_version": 1}, {})


def test_changed_code_is_said_and_the_run_goes_on(run, capsys):
    for before, now in (("abc", "def"), ("abc", "abc")):
        (run.path / "run.json").write_text(json.dumps({"settings": SETTINGS, "environment": {"code": before}}))
        open_folder(run.path, SETTINGS, {"code": now})
        assert ("rounded differently (code abc there, def now)" in capsys.readouterr().out) == (before != now)


@pytest.mark.parametrize("code", [{"code": "abc"}, {}])
def test_a_run_from_before_there_were_versions_goes_on_as_the_first_one(run, capsys, code):
    written = json.dumps({"settings": {**SETTINGS, **code}, "environment": {"torch": "2"}})
    (run.path / "run.json").write_text(written)
    settings = {**SETTINGS, "sampler_version": 1}
    open_folder(run.path, settings, {"torch": "2", "code": "def"})
    assert run.unfinished() == [1]
    assert f"code {code.get('code', 'unknown')} there, def now" in capsys.readouterr().out
    assert (run.path / "run.json").read_text() == written, "how the run began is lost"
    with pytest.raises(InputError, match="version 1 of the sampler"):
        open_folder(run.path, {**SETTINGS, "sampler_version": 2}, {})


def test_a_folder_without_a_finished_batch_takes_new_settings(run):
    for file in (run.path / "batches").iterdir():
        file.unlink()
    open_folder(run.path, {"seed": 1}, {})
    for number in range(3):
        run.save(make_batch(run, number))
    with pytest.raises(InputError, match="seed 1 there, 0 now"):
        open_folder(run.path, SETTINGS, {})


def test_overwriting_leaves_what_is_not_of_the_run(run):
    (run.path / "notes.txt").write_text("mine")
    (run.path / "images" / "holiday.jpg").write_text("mine too")
    open_folder(run.path, {"seed": 1}, {}, overwrite=True)
    assert sorted(path.name for path in run.path.rglob("*.*")) == ["holiday.jpg", "notes.txt", "run.json"]
    assert json.loads((run.path / "run.json").read_text())["settings"] == {"seed": 1}


def test_a_damaged_settings_file_is_named(run):
    (run.path / "run.json").write_text('{"settings": ')
    with pytest.raises(InputError, match=r"run\.json is damaged .* --overwrite"):
        open_folder(run.path, SETTINGS, {})


def test_another_environment_is_said(run, capsys):
    open_folder(run.path, SETTINGS, {"torch": "3", "processor": "new"})
    assert "torch 2 there, 3 now" in capsys.readouterr().out


def test_features_of_another_extractor_are_not_taken(run):
    other = dataclasses.replace(run, extractor="name other")
    assert other.unfinished() == [0, 1, 2]
    assert dataclasses.replace(run, extractor=None).unfinished() == [1]


def test_a_record_with_a_flipped_bit_is_not_taken(run):
    file = run.batch_path(2)
    content = bytearray(file.read_bytes())
    position = content.index(np.float32(2).tobytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert run.unfinished() == [1, 2]


def test_a_disk_too_small_is_refused_before_the_work(run):
    huge = dataclasses.replace(run, labels=range(3000), image_size=10**6)
    with pytest.raises(InputError, match=r"needs about [\d.]+ GB more"):
        huge.check_disk(huge.unfinished())
    unsaved = dataclasses.replace(huge, saved=lambda index: False)
    unsaved.check_disk(unsaved.unfinished())
    assert len(unsaved.unfinished()) == 999


def test_pixels_are_rounded_to_the_nearest():
    values = torch.tensor([-1.2, -1.0, -1 + 2 * 0.49 / 255, -1 + 2 * 0.51 / 255, 0.0, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_the_grid_shows_each_image_in_its_place():
    images = [np.full((4, 4, 3), shade, np.uint8) for shade in range(10, 60, 10)]
    grid = image_grid(images, columns=3, gap=2, min_size=8)
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert [grid[5 + 10 * (n // 3), 5 + 10 * (n % 3), 0] for n in range(6)] == [10, 20, 30, 40, 50, 255]
    assert grid[:2].min() == 255


def test_images_keep_their_order_over_threads():
    images = torch.arange(40).view(20, 2)
    threads = torch.get_num_threads()
    assert torch.equal(torch.cat(map_images(lambda part: part * 2, images)), images * 2)
    assert torch.get_num_threads() == threads


def test_a_decoded_image_depends_neither_on_threads_nor_on_its_batch():
    torch.manual_seed(0)
    vae = AutoencoderKL(**PRESETS["mar_tiny"].vae).eval()
    latents, threads = torch.randn(3, 2, 16, 16), torch.get_num_threads()
    decoded = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        decoded += [decode(vae, latents), torch.cat([decode(vae, one) for one in latents.split(1)])]
    torch.set_num_threads(threads)
    assert all(torch.equal(images, decoded[0]) for images in decoded)


def test_writers_are_bounded_and_report_what_went_wrong():
    go, started = threading.Event(), []

    def slow(number: int) -> None:
        started.append(number)
        assert go.wait(20)

    with Writers(num_threads=2) as writers:
        writers.submit(slow, 0)
        writers.submit(slow, 1)
        third = threading.Thread(target=writers.submit, args=(slow, 2))
        third.start()
        third.join(0.2)
        assert third.is_alive() and 2 not in started
        go.set()
        third.join(20)
        writers.flush()
        assert sorted(started) == [0, 1, 2]
        writers.submit(Path("/proc/nowhere").write_text, "")
        with pytest.raises(OSError):
            writers.flush()


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    with Progress(1000, 200, first_line=0) as progress:
        progress.update(200)
        progress.update(600.25)
        progress.update(600)  # a batch is counted nowhere for a moment
        progress.update(2000)
    progress.update(700)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "200 of 1,000 images, the first step is not finished after 00:00" and len(lines) == 4
    for line, done in zip(lines[1:], ("600.2", "600.2", "1,000")):
        assert line.startswith(f"{done} of 1,000 images, ") and line.endswith(" images/s, about 00:00 left")
    with Progress(1000, enabled=False, first_line=0) as progress:
        progress.update(5)
    assert not capsys.readouterr().err


def test_the_time_between_two_lines_doubles_up_to_a_minute(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress(1000) as progress:
        for second in range(400):
            clock[0] = float(second)
            progress.update(second / 2)
            if capsys.readouterr().err:
                clock.append(second)
    assert clock[1:] == [5, 15, 35, 75, 135, 195, 255, 315, 375]


def test_a_slow_rate_is_seconds_per_image(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress(80) as progress:
        clock[0] = 8.0
        progress.update(2.5)
    assert capsys.readouterr().err == "2.5 of 80 images, 3.20 s per image, about 04:08 left\n"


def test_progress_in_a_terminal_shows_parts_of_images(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(2000, 500) as progress:
        progress.update(1250.26)
    assert " 63%|" in (shown := capsys.readouterr().err) and "1,250.3 of 2,000 images [" in shown


STEPS = make_plan(3, 1, Method(num_iter=3), cfg=1.0).steps


def test_a_batch_moves_by_the_share_of_each_steps_flops():
    steps = StepProgress(20, [100, 300, 600], torch.device("cpu"))
    assert steps.images() == 0
    shown = []
    for step in STEPS:
        steps(step)
        shown.append(steps.images())
    assert shown == pytest.approx([2, 8, 20])


def test_on_a_gpu_a_step_counts_once_the_device_has_done_it(monkeypatch):
    recorded = []

    class Event:
        has_come_to_pass = False

        def record(self) -> None:
            recorded.append(self)

        def query(self) -> bool:
            if self.has_come_to_pass is None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return self.has_come_to_pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    steps = StepProgress(10, [1, 1, 2], torch.device("cuda"))
    for step in STEPS:
        steps(step)
    assert steps.images() == 0 and len(recorded) == 3
    recorded[0].has_come_to_pass = recorded[1].has_come_to_pass = True
    assert steps.images() == 5
    recorded[2].has_come_to_pass = None
    assert steps.images() == 5
    recorded[2].has_come_to_pass = True
    assert steps.images() == 10


def test_a_job_of_one_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    seen = []

    def work(job: Job) -> None:
        seen.append((job.rank, job.world_size, list(job.claim("abc")), job.gather(1), job.share(lambda: {"a": 2})))
        seen.append(job.share(lambda: {3: (1, None)}))

    assert launch(work) == 0
    assert seen == [(0, 1, ["a", "b", "c"], [1], {"a": 2}), {"3": [1, None]}]  # what other ranks would get, too


def test_one_process_of_each_machine_goes_before_its_others():
    """What several write at once to a folder of a machine, such as downloaded weights, would be damaged."""
    ranks, local_ranks, store, order = range(6), [0, 1, 2, 0, 1, 2], torch.distributed.HashStore(), []

    def turn(rank: int) -> str:
        job = Job.__new__(Job)
        job.rank, job.world_size, job.local_rank, job._calls = rank, len(ranks), local_ranks[rank], 0
        job.watch = SimpleNamespace(store=store, stop_signal=None)

        def make() -> str:
            order.append(rank)
            time.sleep(0.2)
            order.append(rank)
            return f"of {rank}"

        return job.in_turn(make)

    with ThreadPoolExecutor(len(ranks)) as threads:
        assert list(threads.map(turn, ranks)) == [f"of {rank}" for rank in ranks]
    assert order[:4] == [0, 0, 3, 3] and sorted(order[4:]) == [1, 1, 2, 2, 4, 4, 5, 5]


@pytest.mark.parametrize(("error", "code"), [(InputError("x"), 2), (Stopped(15), 143), (ValueError("x"), 1)])
def test_what_ends_a_job_decides_its_exit_code(error, code, capsys):
    def work(job: Job) -> None:
        raise error

    assert launch(work) == code
    printed = capsys.readouterr().err
    assert {2: "error: x\n", 143: "stopped by SIGTERM; to go on: python", 1: "ValueError: x"}[code] in printed


# Methods


MAR_SETTINGS = {"num_iter": 64, "num_sampling_steps": 100, "lazy_mar": False, "cache": {}}
OTHERS = [
    "--num_iter 32",
    "--num_sampling_steps 50",
    "--num_sampling_steps 50:5",
    "--num_sampling_steps 50:5:cosine",
    "--unguided_below 1.1",
    "--method gtr",
    "--method gtr --num_iter 20,8,4",
    "--method gtr --num_sampling_steps 50",
    "--method gtr --detailed_tokens 0.2:50",
    "--num_stages 2 --num_iter 40,24",
    "--lazy_mar",
    "--lazy_mar --lazy_sampling_steps 50",
    "--method recap",
]


def settings_of(arguments: str) -> dict:
    return parse_options("", arguments.split()).settings(torch.device("cpu"), torch.float32)


def test_runs_of_methods_that_were_there_before_are_recorded_as_before():
    assert {name: settings_of("")[name] for name in MAR_SETTINGS} == MAR_SETTINGS
    policy = dataclasses.asdict(CachePolicy())
    del policy["lazy_sampling_steps"]
    assert settings_of("--lazy_mar") == {**settings_of(""), "lazy_mar": True, "cache": policy}
    names = "model num_images class_labels eval_bsz cfg cfg_schedule temperature seed device dtype sampler_version"
    assert settings_of("").keys() == {*names.split(), *MAR_SETTINGS}


@pytest.mark.parametrize("began", ["", *OTHERS])
def test_runs_that_differ_in_any_setting_of_their_methods_are_not_mixed(began, tmp_path):
    open_folder(tmp_path, settings_of(began), {})
    (tmp_path / "batches" / "000000.npz").touch()
    check_folder(tmp_path, settings_of(began))
    for other in {"", *OTHERS} - {began}:
        with pytest.raises(InputError, match="holds a run with other settings"):
            check_folder(tmp_path, settings_of(other))
