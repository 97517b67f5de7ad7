"""Many ranks in one process: a thread a rank, messages through memory. For logic, not for transports."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.collectives import Buffer, CollectiveError, Pending, RowsAsMessages, Traffic
from moesaic.collectives.progress import CommunicationThread
from moesaic.placement import Topology
from moesaic.runtime.group import RankGroup

LIMIT_S = 60.0


class ThreadWorld:
    """The mailboxes of R ranks. A message is known by its channel, its two ranks and its number between them.

    Both ranks must say that it is about the same: operation, step, layer and pass.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.mail: dict[tuple[Any, ...], tuple[Tensor, str]] = {}
        self.changed = threading.Condition()
        self.failure: BaseException | None = None

    def post(self, key: tuple[Any, ...], tensor: Tensor, about: str) -> None:
        with self.changed:
            self.mail[key] = tensor.detach().clone(), about
            self.changed.notify_all()

    def take(self, key: tuple[Any, ...], about: str) -> Tensor:
        with self.changed:
            arrived = self.changed.wait_for(lambda: key in self.mail or self.failure is not None, LIMIT_S)
            if key not in self.mail:
                raise RuntimeError(f"another rank failed: {self.failure!r}" if arrived else f"nobody sent {key}")
            self.changed.notify_all()
            tensor, sent_about = self.mail.pop(key)
        if sent_about != about:
            raise CollectiveError(f"{key}: {sent_about} was sent where {about} was expected")
        return tensor

    def until_taken(self, key: tuple[Any, ...]) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: key not in self.mail or self.failure is not None, LIMIT_S)
            if key in self.mail:
                raise RuntimeError(f"another rank failed: {self.failure!r}" if done else f"nobody took {key}")


class ThreadTransport(RowsAsMessages):
    """One rank's end. As in shared memory, whoever receives takes a message at its own wait, and not before.

    Receive buffers are poisoned until then, so that reading too early shows.
    """

    name = "threads"

    def __init__(self, world: ThreadWorld, rank: int, channel: str):
        self.world, self.rank, self.channel = world, rank, channel
        self.world_size = world.world_size
        self.traffic = Traffic(world.world_size)
        self.thread: CommunicationThread | None = None
        self._numbers: dict[tuple[int, int], int] = defaultdict(int)

    def _key(self, src: int, dst: int) -> tuple[Any, ...]:
        self._numbers[src, dst] += 1
        return self.channel, src, dst, self._numbers[src, dst]

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_full(tuple(shape), torch.nan if like.is_floating_point() else -1)

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        expected, about = [], f"{op} at {where}"
        for buffer in recvs:
            assert buffer.peer != self.rank
            if buffer.tensor.numel():
                buffer.tensor.fill_(torch.nan if buffer.tensor.is_floating_point() else -1)
                expected.append((self._key(buffer.peer, self.rank), buffer.tensor))
        sent = []
        for buffer in sends:
            assert buffer.peer != self.rank
            assert buffer.tensor.is_contiguous()
            if buffer.tensor.numel():
                self.traffic.add(op, buffer.peer, buffer.tensor.nbytes)
                sent.append(self._key(self.rank, buffer.peer))
                self.world.post(sent[-1], buffer.tensor, about)
        return _Messages(self.world, expected, sent, about)

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        for peer in peers:
            self.world.post(self._key(self.rank, peer), values, "gather")
        gathered = {peer: self.world.take(self._key(peer, self.rank), "gather") for peer in peers} | {self.rank: values}
        return torch.stack([gathered[r] for r in range(self.world_size)])


class _Messages:
    def __init__(
        self, world: ThreadWorld, expected: list[tuple[tuple[Any, ...], Tensor]], sent: list[tuple[Any, ...]], about: str
    ):
        self._world, self._expected, self._sent, self._about = world, expected, sent, about

    def wait(self, *, until_sent: bool = True) -> None:
        for key, tensor in self._expected:
            arrived = self._world.take(key, self._about)
            assert arrived.shape == tensor.shape, f"{key}: sent {tuple(arrived.shape)}, expected {tuple(tensor.shape)}"
            assert arrived.dtype == tensor.dtype
            tensor.copy_(arrived)
        self._expected = []
        for key in self._sent if until_sent else ():
            self._world.until_taken(key)


def run_threads(
    world_size: int, body: Callable[..., Any], *args: Any, topology: Topology | None = None, num_replicas: int = 1
) -> list[Any]:
    """Run `body(group, *args)` on every rank of `num_replicas` groups; return the results in rank order, group by group."""
    groups = [ThreadWorld(world_size) for _ in range(num_replicas)]
    replicas = [ThreadWorld(num_replicas) for _ in range(world_size)]
    worlds = [*groups, *replicas]
    topology = topology or Topology.preset("cpu", world_size)
    results: list[Any] = [None] * (num_replicas * world_size)

    def run(index: int) -> None:
        group, rank = divmod(index, world_size)
        ranks = RankGroup(
            ThreadTransport(groups[group], rank, "tokens"),
            ThreadTransport(groups[group], rank, "experts"),
            topology,
            ThreadTransport(replicas[rank], group, "replicas"),
            Topology.preset("cpu", num_replicas),
        )
        try:
            results[index] = body(ranks, *args)
        except BaseException as error:
            for world in worlds:
                with world.changed:
                    world.failure = world.failure or error
                    world.changed.notify_all()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for world in worlds:
        if world.failure is not None:
            raise world.failure
        assert not world.mail, f"messages nobody received: {list(world.mail)}"
    return results
