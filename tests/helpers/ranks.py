"""Ranks as real processes: pools that stay up between tests, one for each world size, over Gloo.

Every rank is forked from one server that has imported what all of them need and has started no thread: importing torch
takes seconds, a fork milliseconds.
"""

import atexit
import gc
import importlib
import multiprocessing
import multiprocessing.forkserver
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moesaic.collectives.lifetime import end_with_parent

LIMIT_S = 120.0


def forking() -> ForkServerContext:
    """The way to start processes: forked from the server, of which a test run has one."""
    context = multiprocessing.get_context("forkserver")
    families = ["tests.helpers.preload_families"] if "transformers" in sys.modules else []  # where a collected file imports it
    loops = ["tests.helpers.preload_loops"] if "moesaic.transformers" in sys.modules else []
    context.set_forkserver_preload(["tests.helpers.preload", *families, *loops, "hypothesis", "pytest"])
    multiprocessing.forkserver.ensure_running()
    return context


class RankPool:
    """`world_size` processes in one process group that run top-level functions of test modules together.

    `prepare(rank)`, which must pickle, is the first thing that each of them does. With `may_end` a rank whose process ends
    gives None.
    """

    def __init__(self, world_size: int, prepare: Callable[[int], None] | None = None, *, may_end: bool = False):
        self.world_size = world_size
        self._may_end = may_end
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._start(prepare)

    def _start(self, prepare: Callable[[int], None] | None) -> None:
        world_size, store = self.world_size, str(Path(self._folder.name) / "store")
        context = forking()
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_rank, args=(theirs, rank, world_size, store, prepare), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `body(rank, *args)` on every rank; return the results in rank order, or raise the first failure."""
        for pipe in self._pipes:
            pipe.send((body.__module__, body.__qualname__, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT_S):
                self.stop()
                raise TimeoutError(f"rank {rank} of {self.world_size} did not answer within {LIMIT_S:g} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                if not self._may_end:
                    raise
                answers.append((True, None))
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def serve_rank(pipe: Connection, rank: int, world_size: int, store: str, prepare: Callable[[int], None] | None = None) -> None:
    """Be one rank: join the process group, then run what the pipe asks for until it closes."""
    if prepare is not None:
        prepare(rank)
    end_with_parent()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    file_store = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    gc.freeze()
    num_runs = 0
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        num_runs += 1
        close_groups(dist.PrefixStore(str(num_runs), file_store))  # now that no rank communicates in them any more
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def close_groups(store: Any) -> None:
    """End the process groups that tests before have made: each has threads that wake a thousand times a second.

    Later groups get their names, so they meet in another `store`; and torch, which keeps what DTensor operations return, takes
    a mesh over ended groups for one over theirs.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    for group in [group for group in _world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    _clear_sharding_prop_cache()
    gc.collect()
    _world.pg_map[dist.group.WORLD] = (_world.pg_map[dist.group.WORLD][0], store)


_POOLS: dict[tuple[type[RankPool], int], RankPool] = {}


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, kind: type[RankPool] = RankPool) -> list[Any]:
    """Run `body(rank, *args)` on `world_size` processes that share a process group, and return the results in rank order."""
    if (kind, world_size) not in _POOLS:
        _POOLS[kind, world_size] = kind(world_size)
    try:
        return _POOLS[kind, world_size].run(body, *args)
    except BaseException:
        # Ranks that did not fail may still wait for the one that did: the next test gets fresh ones.
        _POOLS.pop((kind, world_size)).stop()
        raise


@atexit.register
def _stop_all() -> None:
    for pool in _POOLS.values():
        pool.stop()
