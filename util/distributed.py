"""The processes of one job: those that torchrun started, or a single one that nobody did.

They speak through torch.distributed's key-value store alone. Without collectives, nothing can wait for a dead process
until some time-out, no rank waits for a slower one, and a CPU job (gloo) and a CUDA job (nccl) are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Callable, TypeVar

import torch.distributed as dist

from util.errors import InputError
from util.signals import StopSignals

T = TypeVar("T")

TICK_SECONDS = 1.0
POLL_SECONDS = 0.1
# Ticks of silence after which a rank counts as dead: while it starts, while it runs, and after a signal. torchrun
# stops the ranks beside a dead one with SIGTERM, just as a preempted job is stopped; only the silence is different.
STARTING, RUNNING, STOPPING = 600, 60, 5


class Stopped(Exception):
    """The signal, by number, has asked the job to stop."""


class Job:
    """This process among the processes of its job.

    A thread gives a sign of life each second, listens for those of others and for signals, and ends the process when
    another rank has failed. All ranks have to call `share`, `claim` and `gather` in the same order.
    """

    def __init__(self) -> None:
        launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        self.rank, self.world_size, self.local_rank = (
            (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if launched else (0, 1, 0)
        )
        self.done = 0  # units of work that this rank has finished
        self.on_tick: Callable[[], object] = lambda: None  # called each second, by another thread
        self._beats: dict[int, str] = {}  # the last sign of life of the ranks that this one listens to
        self._silence: dict[int, int] = {}  # ticks since then
        self._lock = threading.Lock()
        self._calls = 0
        self._stop_signal: int | None = None
        self._failed = self._cut_off = self._closed = False

        self._root = dist.HashStore()
        if self.world_size > 1:
            self._root = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0]
            self._root.set_timeout(timedelta(seconds=30))
        # torchrun restarts processes but keeps its store, and its agents may count restarts differently. So rank 0
        # invents a name for this start, and tells each process under a name that the process has invented.
        self._name = uuid.uuid4().hex
        self._store = dist.PrefixStore(self._name, self._root) if self.rank == 0 else None
        self._signals = StopSignals()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        if self.rank != 0:
            _put(self._root, f"hello/{self.rank}", self._name)
            self._store = dist.PrefixStore(self._wait_for(f"welcome/{self._name}", self._root), self._root)

    # What ranks do together

    def print0(self, *values: object) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(*values, flush=True)

    def share(self, make: Callable[[], T]) -> T:
        """What `make()` returns (anything that JSON can hold), on all ranks; only rank 0 calls it."""
        key = self._next_key()
        if self.rank != 0:
            return json.loads(self._wait_for(key))
        value = make()
        _put(self._store, key, json.dumps(value))
        return value

    def in_turn(self, make: Callable[[], T]) -> T:
        """`make()` of each rank: rank 0 calls it first, then the others."""
        value = make() if self.rank == 0 else None
        self.share(lambda: None)
        return value if self.rank == 0 else make()

    def claim(self, items: Sequence[T]) -> Iterator[T]:
        """Hand each of `items`, the same on all ranks, to one rank: first come, first served. A stop ends it early."""
        key = self._next_key()
        while not self.stop_signal:
            position = self._store.add(key, 1) - 1
            if position >= len(items):
                return
            yield items[position]

    def gather(self, value: T) -> list[T] | None:
        """The `value` of every rank (anything that JSON can hold), in rank order, on rank 0; None on the others."""
        key = self._next_key()
        _put(self._store, f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            return [json.loads(self._wait_for(f"{key}/{rank}")) for rank in range(self.world_size)]
        return None

    def count(self, units: int) -> None:
        """Add to `done`; any thread may call it."""
        with self._lock:
            self.done += units

    def all_done(self) -> int:
        """The sum of `done` over all ranks, as of about a second ago. For rank 0 only."""
        return self.done + sum(int(beat.split()[1]) for beat in list(self._beats.values()))

    @property
    def stop_signal(self) -> int | None:
        """The number of the signal that asks the job to stop, whichever rank received it."""
        return self._signals.received or self._stop_signal

    def check_stop(self) -> None:
        """Raise `Stopped` if a signal has asked the job to stop."""
        if self.stop_signal:
            raise Stopped(self.stop_signal)

    def fail(self, message: str, code: int) -> None:
        """Have all other ranks exit with `code`, and print why, unless another rank has done so."""
        self._failed = True
        store, first = self._store or self._root, True
        with contextlib.suppress(RuntimeError):
            first = store.add("failures", 1) == 1
            _put(store, "failed", str(code))
        if first:
            print(f"[rank {self.rank}] {message}" if self.rank else message, file=sys.stderr, flush=True)
        if self.rank == 0 and self.world_size > 1:
            time.sleep(2 * TICK_SECONDS)  # the store may end with this process, before the others have heard

    def leave(self) -> None:
        """Wait until all ranks are ready to exit: an early exit would make torchrun signal the others once more."""
        with contextlib.suppress(RuntimeError):
            _put(self._store, f"ready/{self.rank}", "")
            waiting_for = [f"ready/{rank}" for rank in range(self.world_size)] if self.rank == 0 else ["bye"]
            while not self._cut_off and any(_peek(self._store, key) is None for key in waiting_for):
                time.sleep(POLL_SECONDS)
            _put(self._store, "bye", "")

    def close(self) -> None:
        """End the thread and give the signals back."""
        self._closed = True
        self._signals.wake()
        self._thread.join()
        self._signals.close()

    # What holds them together

    def _next_key(self) -> str:
        self._calls += 1
        return f"call/{self._calls}"

    def _wait_for(self, key: str, store: dist.Store | None = None) -> str:
        while (value := _peek(store or self._store, key)) is None:
            self.check_stop()
            time.sleep(POLL_SECONDS)
        return value

    def _watch(self) -> None:
        for tick in itertools.count():
            self._signals.wait(TICK_SECONDS)
            if self._closed:
                return
            if not self._cut_off:
                try:
                    self._listen(tick)
                except RuntimeError:  # the store has gone, and with it the launcher or its machine
                    self._cut_off = True
                    if not self.stop_signal:
                        self._end("the connection to the job's other processes is lost")
            self.on_tick()

    def _listen(self, tick: int) -> None:
        """Exchange signs of life, requests to stop and failures with the other ranks."""
        if self._store is None:
            return self._hear(0)
        failure = _peek(self._store, "failed")
        if failure is not None and not self._failed:
            os._exit(int(failure))
        if self._signals.received:
            _put(self._store, "stop", str(self._signals.received))
        elif stop := _peek(self._store, "stop"):
            self._stop_signal = int(stop)
        _put(self._store, f"beat/{self.rank}", f"{tick} {self.done}")
        if self.rank != 0:
            return self._hear(0)
        for rank in range(1, self.world_size):
            if hello := _peek(self._root, f"hello/{rank}"):
                _put(self._root, f"welcome/{hello}", self._name)
            self._hear(rank)

    def _hear(self, rank: int) -> None:
        """Count the ticks since another rank's last sign of life, and end the job when there are too many.

        Ticks instead of time, because a whole job may be suspended and go on hours later.
        """
        beat = _peek(self._store, f"beat/{rank}") if self._store is not None else None
        if beat is not None and beat != self._beats.get(rank):
            self._beats[rank], self._silence[rank] = beat, 0
            return
        self._silence[rank] = self._silence.get(rank, 0) + 1
        patience = STOPPING if self.stop_signal else RUNNING if rank in self._beats else STARTING
        if self._silence[rank] > patience and not self._failed:
            self._end(f"rank {rank} has given no sign of life for {patience} s")

    def _end(self, reason: str) -> None:
        self.fail(f"error: {reason}; to go on: {command_line()}", 1)
        os._exit(1)


def launch(work: Callable[[Job], None]) -> int:
    """Run `work` in this process of the job, and return the exit code.

    0, 2 for an `InputError`, 128 + its number for a signal, and 1 otherwise. What went wrong is printed once, and the
    other ranks end too.
    """
    try:
        job = Job()
    except Stopped as stopped:
        return 128 + stopped.args[0]
    try:
        work(job)
        job.leave()
        return 0
    except Stopped as stopped:
        name = signal.Signals(stopped.args[0]).name
        job.leave()
        if job.rank == 0:
            print(f"stopped by {name}; to go on: {command_line()}", file=sys.stderr, flush=True)
        return 128 + stopped.args[0]
    except InputError as error:
        job.fail(f"error: {error}", 2)
        return 2
    except Exception as error:
        if job.stop_signal and isinstance(error, dist.DistError):  # the launcher was faster
            return 128 + job.stop_signal
        job.fail(traceback.format_exc(), 1)
        return 1
    finally:
        job.close()


def command_line() -> str:
    """The command that this process was started with, as far as it can know."""
    launcher = "python"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        nodes, local = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = f"torchrun --nnodes={nodes} --nproc_per_node={local}"
    return f"{launcher} {shlex.join(sys.argv)}"


def _put(store: dist.Store, key: str, value: str) -> None:
    store.set(key, value)
    store.add(f"{key}/count", 1)


def _peek(store: dist.Store, key: str) -> str | None:
    """The value of `key`, or None if it is not there yet; `get` alone would wait for it."""
    return store.get(key).decode() if store.add(f"{key}/count", 0) else None
