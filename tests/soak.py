"""Kills a run of eval.py again and again at random moments, continues it, and says what was lost.

    python tests/soak.py --kills 100 --processes 2

Nothing may be lost: at every moment each image that is there has the bytes that an undisturbed run gives it, no
finished batch is made again, and the scores at the end are the same. Takes about 5 s per kill.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import Ranks, make_weights

from util.cli import Parser
from util.errors import exits_cleanly


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def scores(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name.startswith(("fid", "isc"))}


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add("--kills", int, "how often to kill the run", default=30, minimum=1)
    parser.add("--processes", int, "the most processes of a start, each of which draws a number", default=2, minimum=1)
    parser.add("--num_images", int, "images of the run", default=200, minimum=1)
    parser.add("--seed", int, "seed of the moments and the kinds of kill", default=0)
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        size = f"--num_images {options.num_images} --eval_bsz 4 --num_iter 4 --num_sampling_steps 4"
        arguments = [*make_weights(work), *size.split(), "--lazy_mar", "--start_step", "1"]
        print("the undisturbed run ...", flush=True)
        job = Ranks([*arguments, "--output_dir", str(work / "whole")], work / "log")
        if job.wait(3600) != [0]:
            sys.exit(job.log.read_text())
        whole, folder = contents(work / "whole", "images/*.png"), work / "run"

        lost = wrong = finished_runs = 0
        for number in range(options.kills):
            records = contents(folder, "batches/*.npz")
            job = Ranks([*arguments, "--output_dir", str(folder)], work / "log", chance.randint(1, options.processes))
            deadline = time.monotonic() + chance.uniform(0, 12)
            while time.monotonic() < deadline and job.processes[0].is_alive():
                time.sleep(0.01)
            # A machine that is lost, a process that is lost, and a preemption.
            kind = chance.choice(["all killed", "one killed", "stopped"])
            if kind == "stopped":
                job.signal(signal.SIGTERM)
                job.wait(60)
            elif kind == "one killed":
                chance.choice(job.processes).kill()
                time.sleep(chance.uniform(0, 2))
            job.kill()
            after = contents(folder, "batches/*.npz")
            lost += sum(after.get(name) != content for name, content in records.items())
            images = contents(folder, "images/*.png")
            wrong += sum(whole[name] != content for name, content in images.items())
            print(
                f"{number + 1}: {kind}, {len(images)} images, {len(after)} batches; lost {lost}, wrong {wrong}",
                flush=True,
            )
            if len(after) * 4 >= options.num_images:  # begin anew, so that every kill finds a run to disturb
                finished_runs += 1
                folder = work / f"run{finished_runs}"
        job = Ranks([*arguments, "--output_dir", str(folder)], work / "log")
        if job.wait(3600) != [0]:
            sys.exit(job.log.read_text())
        images = contents(folder, "images/*.png")
        same = images == whole and scores(folder) == scores(work / "whole")
        end = "the same" if same else "NOT the same"
        print(f"{options.kills} kills: {lost} batches lost, {wrong} images wrong; the end is {end}")
        return 0 if same and not lost + wrong else 1


if __name__ == "__main__":
    sys.exit(main())
