"""The processes of one job: those that torchrun started, or a single one that was started without torchrun.

They communicate through torch.distributed's key-value store alone, without collectives. A collective would hang until a
time-out when a process has died, and would make every rank wait for the slowest one; and the store is the same for jobs
on CPUs and on GPUs. What may go wrong between processes, and who notices it, is in `util/job/watch.py`.

Every call of `share`, `claim` or `gather` has a key of its own, "call/1", "call/2" and so on, which each rank counts by
itself: that is why all ranks must make these calls in the same order. No key is ever used twice within one start of the
job, so a value, once it is there, is the one that was meant, however late a rank comes to read it.
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
    """A signal has asked the job to stop; the argument is the signal's number."""


class Job:
    """This process among the processes of its job.

    All ranks have to call `share`, `in_turn`, `claim` and `gather` in the same order. Values pass between ranks as
    JSON. A rank that waits for another raises `Stopped` if a signal has asked the job to stop.

    Attributes:
        rank, world_size, local_rank: as torchrun numbers processes; 0, 1 and 0 without it.
        watch:                        what this process knows of the others, and they of it.
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
        """Call `make()` on all ranks, and return each rank's own result, of any type.

        Rank 0 goes first, then the first process of every other machine, then all others. So what `make` leaves on a
        disk is written once, be it that of one machine or one that several share.
        """
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self._barrier()
        value = make()
        for _ in range(turn, 2):
            self._barrier()
        return value

    def claim(self, items: Sequence[T]) -> Iterator[T]:
        """Take items from a work queue that all ranks share: each item goes to the rank that asks first.

        `items` must be the same on all ranks. A signal to stop ends the iteration early.
        """
        key = self._next_key()
        while not self.watch.stop_signal:
            position = self.watch.store.add(key, 1) - 1
            if position >= len(items):
                return
            yield items[position]

    def gather(self, value: T) -> list[T] | None:
        """Collect the `value` of every rank, in rank order, on rank 0; the others get None and do not wait."""
        key = self._next_key()
        put(self.watch.store, f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return [json.loads(self._wait_for(f"{key}/{rank}")) for rank in range(self.world_size)]
        return None

    def _barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)
        self.share(lambda: None)

    def leave(self) -> None:
        """Wait until all ranks are ready to exit, then let rank 0 exit last.

        An early exit would make torchrun signal the ranks that are still at work, and the store may end with the
        process of rank 0. So each rank says "ready/RANK" and waits; when all are ready, rank 0 says "bye"; the others
        answer "gone/RANK" and exit; and rank 0 exits when all have answered, or after `GOODBYE_SECONDS`, because a rank
        that dies just then never answers.
        """
        store, others = self.watch.store, range(1, self.world_size)
        self.watch.leaving = True

        def wait_for(keys: list[str], seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while (
                not self.watch.cut_off and time.monotonic() < deadline and any(peek(store, key) is None for key in keys)
            ):
                time.sleep(POLL_SECONDS)

        with contextlib.suppress(RuntimeError):  # the store has gone: then there is nobody left to wait for
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

    The code is 0 if all went well, 2 after an `InputError`, 128 + its number after a signal, and 1 after any other
    exception. An error ends all ranks, and is printed once.
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
