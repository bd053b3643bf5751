"""Kills a run of eval.py again and again at random moments, continues it, and says what was lost.

    python tests/soak.py --kills 100 --processes 2

Nothing may be lost: every image always has the bytes of an undisturbed run, no finished batch is made again, and the
FID at the end is the same. Takes about 5 s per kill.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import Ranks, make_weights

from util.cli import Parser, number
from util.errors import exits_cleanly


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def finish(arguments: list[str], folder: Path) -> tuple[dict[str, bytes], float]:
    """Run to the end, undisturbed; return the images and the FID."""
    job = Ranks([*arguments, "--output_dir", str(folder)], folder.with_suffix(".log"))
    if job.wait() != [0]:
        sys.exit(job.log.read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    return contents(folder, "images/*.png"), metrics["frechet_inception_distance"]


def disturb(job: Ranks, chance: random.Random) -> str:
    """End a job at a random moment, in one of three ways, of which the name is returned."""
    deadline = time.monotonic() + chance.uniform(0, 12)
    while time.monotonic() < deadline and job.is_alive():
        time.sleep(0.01)
    kind = chance.choice(["machine lost", "process lost", "preempted"])
    if kind == "preempted":
        job.signal(signal.SIGTERM)
        job.wait()
    elif kind == "process lost":
        chance.choice(job.processes).kill()
        time.sleep(chance.uniform(0, 2))  # until a launcher would end the others
    job.kill()
    return kind


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=number(int, 1), default=30, metavar="N", help="how often to kill the run")
    add("--processes", type=number(int, 1), default=2, metavar="N", help="the most processes that a start draws")
    add("--num_images", type=number(int, 1), default=200, metavar="N", help="images of the run")
    add("--seed", type=int, default=0, metavar="N", help="seed of the moments and kinds of kill")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        size = f"--num_images {options.num_images} --num_iter 4 --num_sampling_steps 4 --dtype float32"
        command = [*make_weights(work), *size.split(), "--lazy_mar", "--start_step", "1", "--eval_bsz", "4"]
        print("the undisturbed run ...", flush=True)
        whole, fid = finish(command, work / "whole")

        folder, lost, wrong, finished_runs = work / "run", 0, 0, 0
        for kill in range(options.kills):
            before = contents(folder, "batches/*.npz")
            ranks = chance.randint(1, options.processes)
            kind = disturb(Ranks([*command, "--output_dir", str(folder)], work / "log", ranks), chance)
            after, images = contents(folder, "batches/*.npz"), contents(folder, "images/*.png")
            lost += sum(after.get(name) != content for name, content in before.items())
            wrong += sum(whole[name] != content for name, content in images.items())
            print(f"{kill + 1}: {kind}, {len(images)} images; {lost} batches lost, {wrong} images wrong", flush=True)
            if len(after) * 4 >= options.num_images:  # begin anew, so that every kill finds a run to disturb
                finished_runs += 1
                folder = work / f"run{finished_runs}"
        same = finish(command, folder) == (whole, fid)
        end = "the same" if same else "NOT the same"
        print(f"{options.kills} kills: {lost} batches lost, {wrong} images wrong; the end is {end}")
        return 0 if same and not lost + wrong else 1


if __name__ == "__main__":
    sys.exit(main())
