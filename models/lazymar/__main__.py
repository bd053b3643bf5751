"""Print the plan of a run: `python -m models.lazymar --method lazymar+disa`."""

from __future__ import annotations

import argparse

from models.lazymar.methods import METHODS, find_method
from models.lazymar.plan import CFG_SCHEDULES, describe, make_plan


def steps(text: str) -> tuple[int, ...]:
    """Read a number of autoregressive steps for each stage, with commas between them."""
    return tuple(map(int, text.split(",")))


def main() -> None:
    """Read the command line and print the plan, over 256 tokens behind 64 buffer rows."""
    parser = argparse.ArgumentParser(
        prog="python -m models.lazymar", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = ", ".join(METHODS)
    name = parser.add_mutually_exclusive_group()
    name.add_argument("--method", default="mar", metavar="NAME", help=f"of {names}; + joins several")
    name.add_argument("--lazy_mar", action="store_const", const="lazymar", dest="method", help="--method lazymar")
    parser.add_argument(
        "--num_iter", type=steps, metavar="N,...", help="autoregressive steps of each stage, in place of the method's"
    )
    parser.add_argument("--cfg", type=float, default=3.25, metavar="SCALE", help="CFG scale; 1 is no guidance")
    parser.add_argument("--cfg_schedule", choices=CFG_SCHEDULES, default="linear", help="how the CFG scale grows")
    args = parser.parse_args()
    try:
        method = find_method(args.method)
        if args.num_iter is not None:
            method = method.replaced(num_iter=args.num_iter)
        plan = make_plan(256, 64, method, cfg=args.cfg, cfg_schedule=args.cfg_schedule)
    except ValueError as error:
        parser.error(f"--{error}")
    print(describe(plan))


main()
