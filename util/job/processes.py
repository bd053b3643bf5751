"""The processes of one job: those that torchrun started, or a single one that nobody did.

They speak through torch.distributed's key-value store alone. Without collectives, nothing can wait for a dead process
until some time-out, no rank waits for a slower one, and a CPU job (gloo) and a CUDA job (nccl) are the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Callable, TypeVar

import torch.distributed as dist

from util.errors import InputError
from util.job.watch import POLL_SECONDS, Watch, command_line, peek, put

T = TypeVar("T")

GOODBYE_SECONDS = 10.0


class Stopped(Exception):
    """The signal, by number, has asked the job to stop."""


class Job:
    """This process among the processes of its job.

    All ranks have to call `share`, `claim` and `gather` in the same order. What they pass on is anything that JSON can
    hold. While waiting for each other they raise `Stopped` if a signal has asked the job to stop.
    """

    def __init__(self) -> None:
        launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        numbers = [int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        self.rank, self.world_size, self.local_rank = numbers if launched else (0, 1, 0)
        store = dist.HashStore()
        if self.world_size > 1:
            store = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0]
            store.set_timeout(timedelta(seconds=30))
        self.watch = Watch(store, self.rank, self.world_size)
        self._calls = 0

    def print0(self, *values: object) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(*values, flush=True)

    def check_stop(self) -> None:
        """Raise `Stopped` if a signal has asked the job to stop."""
        if self.watch.stop_signal:
            raise Stopped(self.watch.stop_signal)

    def share(self, make: Callable[[], T]) -> T:
        """Broadcast what `make()` returns on rank 0, which alone calls it.

        All ranks, rank 0 too, get the value as it comes back from JSON: tuples as lists, keys as strings.
        """
        key = self._next_key()
        if self.rank == 0:
            put(self.watch.store, key, json.dumps(make()))
        return json.loads(self._wait_for(key))

    def in_turn(self, make: Callable[[], T]) -> T:
        """`make()` of each rank, whatever it returns: rank 0 calls it first, then the others."""
        value = make() if self.rank == 0 else None
        self.share(lambda: None)
        return value if self.rank == 0 else make()

    def claim(self, items: Sequence[T]) -> Iterator[T]:
        """Hand each of `items`, the same on all ranks, to one rank: first come, first served. A stop ends it early."""
        key = self._next_key()
        while not self.watch.stop_signal:
            position = self.watch.store.add(key, 1) - 1
            if position >= len(items):
                return
            yield items[position]

    def gather(self, value: T) -> list[T] | None:
        """The `value` of every rank, in rank order, on rank 0; None on the others."""
        key = self._next_key()
        put(self.watch.store, f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return [json.loads(self._wait_for(f"{key}/{rank}")) for rank in range(self.world_size)]
        return None

    def leave(self) -> None:
        """Wait until all ranks are ready to exit: an early exit would make torchrun signal the others once more.

        Rank 0 exits last, because the store may end with it.
        """
        store, others = self.watch.store, range(1, self.world_size)
        self.watch.leaving = True

        def wait_for(keys: list[str], seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while (
                not self.watch.cut_off and time.monotonic() < deadline and any(peek(store, key) is None for key in keys)
            ):
                time.sleep(POLL_SECONDS)

        with contextlib.suppress(RuntimeError):
            put(store, f"ready/{self.rank}", "")
            wait_for([f"ready/{rank}" for rank in others] if self.rank == 0 else ["bye"], float("inf"))
            self.watch.close()
            put(store, "bye" if self.rank == 0 else f"gone/{self.rank}", "")
            wait_for([f"gone/{rank}" for rank in others] if self.rank == 0 else [], GOODBYE_SECONDS)

    def _next_key(self) -> str:
        self._calls += 1
        return f"call/{self._calls}"

    def _wait_for(self, key: str) -> str:
        while (value := peek(self.watch.store, key)) is None:
            self.check_stop()
            time.sleep(POLL_SECONDS)
        return value


def launch(work: Callable[[Job], object]) -> int:
    """Run `work` in this process of the job, and return the exit code.

    0; 2 for an `InputError`; 128 + its number for a signal; 1 for anything else. What went wrong is printed once, and
    the other ranks end too.
    """
    job = Job()
    try:
        work(job)
        job.leave()
        return 0
    except Stopped as stopped:
        number = stopped.args[0]
        job.leave()
        if job.rank == 0:
            message = f"stopped by {signal.Signals(number).name}; to go on: {command_line()}"
            print(message, file=sys.stderr, flush=True)
        return 128 + number
    except InputError as error:
        job.watch.fail(f"error: {error}", 2)
        return 2
    except Exception as error:
        if job.watch.stop_signal and isinstance(error, dist.DistError):  # the launcher has gone first
            return 128 + job.watch.stop_signal
        job.watch.fail(traceback.format_exc(), 1)
        return 1
    finally:
        job.watch.close()
        job.watch.release_signals()
