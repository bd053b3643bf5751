"""The processes of a job: what they share, how they stop, and which launches are refused."""

import itertools
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from util.errors import InputError
from util.processes import Job, Stopped, launch

ROOT = Path(__file__).parents[1]
RANKS = {0: 0, 1: 0, 2: 1, 3: 0, 4: 1}  # and their local ranks: three machines, of which two have two ranks


@pytest.fixture
def start(monkeypatch) -> Callable[[Callable[[Job], object]], list]:
    """Calls a function with each rank's job, in threads. All starts share a store, as restarts by torchrun do."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 0)]))

    def start(work: Callable[[Job], object]) -> list:
        def rank(number: int) -> object:
            try:
                return work(Job({"RANK": str(number), "WORLD_SIZE": "5", "LOCAL_RANK": str(RANKS[number])}))
            except Stopped as stopped:
                return stopped.args[0]

        with ThreadPoolExecutor(len(RANKS)) as threads:
            return list(threads.map(rank, RANKS))

    return start


def test_ranks_share_values_work_and_counts(start):
    def work(job: Job) -> tuple:
        value = job.share(lambda: [f"of {job.rank}"])[0]
        claimed = list(job.claim(range(100)))
        job.count(len(claimed))
        job.barrier()
        return value, claimed, job.count(0)

    values, claimed, counts = zip(*start(work))
    assert set(values) == {"of 0"} and set(counts) == {100}
    assert sorted(itertools.chain(*claimed)) == list(range(100))


def test_one_process_of_each_machine_goes_before_its_others(start):
    """What several write at once to a folder of a machine, such as downloaded weights, would be damaged."""
    order = []

    def work(job: Job) -> int:
        def make() -> int:
            order.append(job.rank)
            time.sleep(0.05)
            order.append(job.rank)
            return job.rank

        return job.in_turn(make)

    assert start(work) == [*RANKS]
    assert order[:2] == [0, 0] and sorted(order[2:6]) == [1, 1, 3, 3] and sorted(order[6:]) == [2, 2, 4, 4]


def test_a_rank_that_ends_early_ends_all_and_a_restart_knows_nothing_of_it(start):
    def fails(job: Job) -> int:
        job.share(lambda: "old")
        if job.rank == 3:
            job.fail(7)
            return 7
        job.barrier()
        return 0

    assert start(fails) == [7] * len(RANKS)
    assert start(lambda job: job.share(lambda: "new")) == ["new"] * len(RANKS)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (InputError("x"), 2, "error: x\n"),
        (Stopped(130), 130, "stopped by SIGINT; the same command goes on"),
        (ValueError("x"), 1, "ValueError: x"),
    ],
)
def test_what_ends_a_job_decides_its_exit_code(error, code, printed, capsys):
    def work(job: Job) -> None:
        raise error

    assert launch(work) == code
    assert printed in capsys.readouterr().err


def test_two_slurm_jobs_on_one_node_meet_at_different_ports(tmp_path):
    """The batch script with stand-ins for SLURM's commands, which print what they are asked to run."""
    for name, answer in {"scontrol": "echo node7", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    commands = []
    for job in ("4711", "24712"):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "SLURM_NNODES": "2"}
        script = ["bash", str(ROOT / "examples" / "slurm.sbatch"), "--lazy_mar"]
        commands.append(subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout)
    assert "--rdzv_endpoint=node7:14711 eval.py" in commands[0] and "--rdzv_endpoint=node7:14712 " in commands[1]
    assert all(command.endswith(" --lazy_mar\n") and "torchrun --nnodes=2" in command for command in commands)
