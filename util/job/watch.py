"""Keeps the processes of a job together: a thread passes on signs of life, failures and requests to stop.

All of it goes through keys of the job's key-value store:

    hello/RANK      a name that a process has invented for itself, so that rank 0 can answer this very process
    welcome/NAME    rank 0's answer to the process NAME: the prefix of all keys below
    beat/RANK       a rank's sign of life, written each second: a count of ticks, and the work that it has done
    failures        how many ranks have failed; the first one prints its error
    failed          the exit code with which all ranks are to end
    stop            the number of the signal that asks the job to stop

"hello" and "welcome" are there because torchrun restarts processes, but not their store, which then still holds the
keys of earlier starts; and its agents on several machines may disagree about how many restarts there were, so that no
number of torchrun's can tell one start from another. A process that read an old "failed" would exit at once, for a
fault of the start before. So rank 0 invents a name for its start, and everything else is said under that name as a
prefix. A "welcome" cannot be an old one, either, because it is addressed to a name that the process has only just
invented.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import threading
import time
import uuid
from typing import Callable

import torch.distributed as dist

from util.job.signals import StopSignals

TICK_SECONDS = 1.0
POLL_SECONDS = 0.1
# Ticks of silence after which a rank counts as dead: while it starts, while it runs, and after a signal. torchrun
# stops the ranks beside a dead one with SIGTERM, just as a preempted job is stopped; only the silence is different.
STARTING, RUNNING, STOPPING = 600, 60, 5


def nothing() -> float:
    """Return 0: `Watch.under_way` while no work is in hand."""
    return 0.0


class Watch:
    """Watches the other ranks of a job, in a thread: rank 0 watches all others, and they watch rank 0.

    Making one returns when this process has its place in the job, and rank 0 has answered it.

    Args:
        root: the store of the job, which may hold what earlier starts have left.

    Attributes:
        store:     `root` under the prefix that belongs to this start of the job.
        done:      units of work that this rank has finished; see `count`.
        under_way: returns how many units the unfinished work of this rank amounts to; the thread calls it.
        on_tick:   called by the thread each second.
        cut_off:   True once the store has gone.
        leaving:   True while this rank exits, when the loss of the store is no failure.
    """

    def __init__(self, root: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.root = root
        self._store: dist.Store | None = None  # until rank 0 has answered
        self.done, self._lock = 0, threading.Lock()
        self.under_way = nothing
        self.on_tick: Callable[[], object] = lambda: None
        self.cut_off = self.leaving = False
        self._name = uuid.uuid4().hex
        self._beats: dict[int, str] = {}  # the last sign of life of the ranks that this one listens to
        self._silence: dict[int, int] = {}  # ticks since then
        self._failed = self._closed = False
        self._told_to_stop: int | None = None
        self._signals = StopSignals()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        start_name = self._name
        if rank != 0:
            put(root, f"hello/{rank}", self._name)
            while (answer := peek(root, f"welcome/{self._name}")) is None:
                time.sleep(POLL_SECONDS)
            start_name = answer
        self._store = dist.PrefixStore(start_name, root)

    @property
    def store(self) -> dist.Store:
        assert self._store is not None  # the constructor returns when rank 0 has answered
        return self._store

    @property
    def stop_signal(self) -> int | None:
        """The number of the signal that asks the job to stop, whichever rank received it."""
        return self._signals.received or self._told_to_stop

    def count(self, units: int) -> None:
        """Add to `done`. Any thread may call it."""
        with self._lock:
            self.done += units

    def all_done(self) -> float:
        """Add up the work that all ranks have done or have under way, as of about a second ago. For rank 0 only."""
        return self._units() + sum(float(beat.split()[1]) for beat in list(self._beats.values()))

    def _units(self) -> float:
        return self.done + self.under_way()

    def fail(self, message: str, code: int) -> None:
        """Make the other ranks exit with `code`, and print the reason, unless another rank has failed before."""
        self._failed, first = True, True
        store = self._store or self.root
        with contextlib.suppress(RuntimeError):
            first = store.add("failures", 1) == 1
            put(store, "failed", str(code))
        if first:
            print(f"[rank {self.rank}] {message}" if self.rank else message, file=sys.stderr, flush=True)
        if self.rank == 0 and self.world_size > 1:
            time.sleep(2 * TICK_SECONDS)  # the store may end with this process, before the others have heard

    def close(self) -> None:
        """End the thread, and with it this rank's signs of life."""
        self._closed = True
        self._signals.wake()
        self._thread.join()

    def release_signals(self) -> None:
        """Give the signals back to their earlier handlers."""
        self._signals.close()

    def _run(self) -> None:
        for tick in itertools.count():
            self._signals.wait(TICK_SECONDS)
            if self._closed:
                return
            if not self.cut_off:
                try:
                    self._listen(tick)
                except RuntimeError:  # the store has gone, and with it the launcher or its machine
                    self.cut_off = True
                    if not (self.stop_signal or self.leaving):
                        self._end("the connection to the job's other processes is lost")
            self.on_tick()

    def _listen(self, tick: int) -> None:
        """Pass on and take note of failures, requests to stop and signs of life, once."""
        if self._store is None:  # rank 0 has not answered
            return self._hear(0)
        failure = peek(self.store, "failed")
        if failure is not None and not self._failed:
            os._exit(int(failure))
        if self._signals.received:
            put(self.store, "stop", str(self._signals.received))
        elif stop := peek(self.store, "stop"):
            self._told_to_stop = int(stop)
        put(self.store, f"beat/{self.rank}", f"{tick} {self._units()}")
        if self.rank != 0:
            return self._hear(0)
        for rank in range(1, self.world_size):
            if hello := peek(self.root, f"hello/{rank}"):
                put(self.root, f"welcome/{hello}", self._name)
            self._hear(rank)

    def _hear(self, rank: int) -> None:
        """Count the ticks since another rank's last sign of life, and end the job when there are too many.

        Ticks are counted instead of seconds because a job may be suspended as a whole and go on hours later: then no
        rank has been silent by its own count, however late it is.
        """
        beat = peek(self.store, f"beat/{rank}") if self._store is not None else None
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


def command_line() -> str:
    """Reconstruct the command that continues this job, as far as a process can know how it was launched."""
    launcher = "python"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        nodes, local = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = f"torchrun --nnodes={nodes} --nproc_per_node={local}"
    return f"{launcher} {shlex.join(argument for argument in sys.argv if argument != '--overwrite')}"


def put(store: dist.Store, key: str, value: str) -> None:
    """Set `key` so that `peek` finds it: the value first, then a counter that says that the value is there."""
    store.set(key, value)
    store.add(f"{key}/count", 1)


def peek(store: dist.Store, key: str) -> str | None:
    """Return the value of `key`, or None if it has not been put there yet.

    A store's own `get` waits for a missing key. Adding 0 to the counter never waits, and gives 0 before `put`.
    """
    return store.get(key).decode() if store.add(f"{key}/count", 0) else None
