"""The command line `python -m models.lazymar`."""

from __future__ import annotations

import argparse

from models.lazymar.plan import CFG_SCHEDULES, REFERENCE_STEPS, CachePolicy, describe, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the plan of a run.")
    parser.add_argument("--num_iter", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--cfg", type=float, default=3.25)
    parser.add_argument("--cfg_schedule", choices=CFG_SCHEDULES, default="linear")
    parser.add_argument("--lazy_mar", action="store_true")
    args = parser.parse_args()
    seq_len, buffer_size = 256, 64
    policy = CachePolicy() if args.lazy_mar else None
    try:
        steps = make_plan(seq_len, buffer_size, args.num_iter, args.cfg, args.cfg_schedule, policy)
    except ValueError as error:
        parser.error(str(error))
    print(describe(steps, seq_len + buffer_size))


main()
