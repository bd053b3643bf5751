"""Print the plan of a run: `python -m models.lazymar --lazy_mar`."""

from __future__ import annotations

import argparse

from models.lazymar.plan import CFG_SCHEDULES, describe, make_plan
from models.lazymar.policy import REFERENCE_STEPS, CachePolicy


def main() -> None:
    """Read the command line and print the plan, over 256 tokens behind 64 buffer rows."""
    parser = argparse.ArgumentParser(
        prog="python -m models.lazymar", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--num_iter", type=int, default=REFERENCE_STEPS, metavar="N", help="autoregressive steps")
    parser.add_argument("--cfg", type=float, default=3.25, metavar="SCALE", help="CFG scale; 1 is no guidance")
    parser.add_argument("--cfg_schedule", choices=CFG_SCHEDULES, default="linear", help="how the CFG scale grows")
    parser.add_argument("--lazy_mar", action="store_true", help="with LazyMAR's caches")
    args = parser.parse_args()
    policy = CachePolicy() if args.lazy_mar else None
    try:
        plan = make_plan(256, 64, num_iter=args.num_iter, cfg=args.cfg, cfg_schedule=args.cfg_schedule, policy=policy)
    except ValueError as error:
        parser.error(f"--{error}")
    print(describe(plan))


main()
