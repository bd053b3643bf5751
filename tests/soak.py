"""Kills a run of eval.py again and again at random moments, continues it, and says what was lost.

    python tests/soak.py --kills 100 --processes 2

Nothing may be lost: every image always has the bytes of an undisturbed run, no finished batch is made again, and the
FID at the end is the same. Takes about 5 s per kill.
"""

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

NUM_IMAGES, BATCH_SIZE = 200, 4


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def finish(command: list[str], folder: Path) -> tuple[dict[str, bytes], float]:
    """Run to the end, undisturbed; return the images and the FID."""
    job = Ranks([*command, "--output_dir", str(folder)], folder.with_suffix(".log"))
    if job.wait() != [0]:
        sys.exit(job.log.read_text())
    return contents(folder, "images/*.png"), json.loads((folder / "metrics.json").read_text())[
        "frechet_inception_distance"
    ]


def disturb(job: Ranks, chance: random.Random) -> None:
    """End a job at a random moment: by SIGTERM, by killing one process and then all, or by killing all."""
    deadline = time.monotonic() + chance.uniform(0, 12)
    while time.monotonic() < deadline and job.is_alive():
        time.sleep(0.01)
    kind = chance.choice(["SIGTERM", "one", "all"])
    if kind == "SIGTERM":
        job.signal(signal.SIGTERM)
        job.wait()
    elif kind == "one":
        chance.choice(job.processes).kill()
        time.sleep(chance.uniform(0, 2))  # until a launcher would end the others
    job.kill()


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=number(int, 1), default=30, metavar="N", help="how often to kill the run")
    add("--processes", type=number(int, 1), default=2, metavar="N", help="the most processes that a start draws")
    options = parser.parse_args(arguments)
    chance, faults = random.Random(0), 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        size = f"--num_images {NUM_IMAGES} --eval_bsz {BATCH_SIZE} --num_iter 4 --num_sampling_steps 4 --dtype float32"
        command = [*make_weights(work), *size.split(), "--lazy_mar", "--start_step", "1"]
        whole = finish(command, work / "run0")
        folder = work / "run1"
        for kill in range(1, options.kills + 1):
            before, ranks = contents(folder, "batches/*.npz"), chance.randint(1, options.processes)
            disturb(Ranks([*command, "--output_dir", str(folder)], work / "log", ranks), chance)
            after, images = contents(folder, "batches/*.npz"), contents(folder, "images/*.png")
            faults += not (before.items() <= after.items() and images.items() <= whole[0].items())
            print(f"{kill}: {len(images)} images; {faults} faults", flush=True)
            if len(after) * BATCH_SIZE == NUM_IMAGES:  # begin anew, so that every kill finds a run to disturb
                folder = work / f"run{kill + 1}"
        faults += finish(command, folder) != whole
    print(f"{options.kills} kills: {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
