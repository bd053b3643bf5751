"""The processes of one job: those that torchrun started, or a single one without torchrun.

torchrun starts the processes, and ends all of them when one fails. They communicate through the key-value store of
torch.distributed alone: a counter says which batch is next. A rank that waits for another polls the store, so signals
reach it and no time limit ends it.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from util.errors import InputError

T = TypeVar("T")

POLL_SECONDS = 0.05
GO_ON = "the same command goes on (without --overwrite)"


class Stopped(Exception):
    """A signal, or the early end of another rank, stops this one. The argument is the exit code."""


class Job:
    """This process among the processes of its job: `rank`, `local_rank` and `world_size` are those of torchrun.

    All ranks call `share`, `in_turn`, `claim` and `barrier` in the same order. A rank that waits for another raises
    `Stopped` after a signal, or when another rank has ended early.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.world_size = int(environment.get("WORLD_SIZE", 1))
        alone = self.world_size == 1
        self.rank, self.local_rank = (0 if alone else int(environment.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self._signal, self._calls, self._queue = 0, 0, ""
        self._store: Any = dist.HashStore() if alone else self._join(next(dist.rendezvous("env://"))[0])

    def _join(self, store: Any) -> Any:
        """Return the store under a prefix of this start of the job.

        When torchrun restarts processes, the store still holds the keys of earlier starts, and the machines may count
        restarts differently. So rank 0 invents the prefix. Every other rank invents a name and reads the prefix from
        the key of that name, which cannot be stale.
        """
        name = uuid.uuid4().hex
        if self.rank > 0:
            store.set(f"name of {self.rank}", name)
            joined = dist.PrefixStore(store.get(f"prefix for {name}").decode(), store)  # waits for rank 0
            joined.add("joined", 1)
            return joined
        joined = dist.PrefixStore(name, store)
        while joined.add("joined", 0) < self.world_size - 1:
            for rank in range(1, self.world_size):
                if store.check([f"name of {rank}"]):
                    store.set(f"prefix for {store.get(f'name of {rank}').decode()}", name)
            time.sleep(POLL_SECONDS)
        return joined

    def print0(self, *values: object) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(*values, flush=True)

    def share(self, make: Callable[[], T]) -> T:
        """Call `make()` on rank 0 and return its value on all ranks, as JSON holds it: keys are strings."""
        key = self._next_key()
        if self.rank == 0:
            self._store.set(key, json.dumps(make()))
        self._wait_until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def in_turn(self, make: Callable[[], T]) -> T:
        """Return each rank's own `make()`: rank 0 goes first, then a rank of every other machine, then all others.

        So `make` may download a file, whether or not the machines share a disk.
        """
        my_turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            if turn == my_turn:
                result = make()
            self.barrier()
        return result

    def claim(self, items: Sequence[T]) -> Iterator[T]:
        """Yield items of a work queue that all ranks share. Raises `Stopped` between items."""
        self._queue = self._next_key()
        while True:
            self._check()
            position = self._store.add(self._queue, 1) - 1
            if position >= len(items):
                return
            yield items[position]

    def count(self, amount: int) -> int:
        """Add to the work that is done in the current queue, and return the sum of all ranks."""
        return self._store.add(f"{self._queue}, done", amount)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        key = self._next_key()
        self._store.add(key, 1)
        self._wait_until(lambda: self._store.add(key, 0) == self.world_size)

    def leave(self) -> None:
        """Let rank 0 exit last: where torchrun does not hold the store, it ends with rank 0."""
        self._store.add("leaving", 1)
        self._wait_until(lambda: self.rank > 0 or self._store.add("leaving", 0) == self.world_size)

    def fail(self, code: int) -> bool:
        """Ask the other ranks to end with this exit code; return False if another rank has done so before."""
        with contextlib.suppress(dist.DistError):  # the store has gone
            if self._store.add("failures", 1) > 1:
                return False
            self._store.set("exit code", str(code))
        return True

    def on_signal(self, number: int, _: object) -> None:
        """Stop the job after the current batch."""
        first, self._signal = not self._signal, number
        if self.rank == 0 and first:
            with contextlib.suppress(OSError):  # Ctrl-C ends `| tee log`, too
                os.write(2, b"\nfinishing the current batch; SIGQUIT (Ctrl-\\) ends the run at once\n")

    def _check(self) -> None:
        """Raise `Stopped` if the job is to stop."""
        if self._signal:
            raise Stopped(128 + self._signal)
        if self._store.check(["exit code"]):
            raise Stopped(int(self._store.get("exit code")))

    def _wait_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._check()
            time.sleep(POLL_SECONDS)

    def _next_key(self) -> str:
        self._calls += 1
        return f"call {self._calls}"


def launch(main: Callable[[Job], object]) -> int:
    """Run `main` in this process of the job, and return the exit code.

    The code is 0 if all went well, 2 after an `InputError` or `OSError`, 128 + its number after a signal, and 1 after
    any other exception. The reason is printed once, by the rank that fails first.
    """
    job, handlers = None, {}
    try:
        job = Job()
        handlers = {number: signal.signal(number, job.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        main(job)
        job.leave()
        return 0
    except Stopped as stopped:
        code = stopped.args[0]
        by = signal.Signals(code - 128).name if code > 128 else "another rank"
        reason = f"stopped by {by}; {GO_ON}"
    except (InputError, OSError) as error:
        code, reason = 2, f"error: {error}"
    except Exception:
        code, reason = 1, traceback.format_exc()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if job is None or job.fail(code):
        with contextlib.suppress(OSError):
            print(reason, file=sys.stderr, flush=True)
    return code
