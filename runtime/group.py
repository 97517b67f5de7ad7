"""The ranks that share experts: how they talk, and what the planner knows of the machine they run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..collectives import LocalTransport, Transport, choose_transport, make_transports, nodes_of_group
from ..placement import Topology


@dataclass(frozen=True, eq=False)
class RankGroup:
    """The ranks of one FSSDP group.

    Token rows and expert weights travel on transports of their own, so that copies in flight for the next layer are
    never mistaken for the rows of this one.
    """

    tokens: Transport
    experts: Transport
    topology: Topology

    def __post_init__(self) -> None:
        sizes = (self.tokens.world_size, self.experts.world_size, self.topology.num_ranks)
        if len(set(sizes)) != 1:
            raise ValueError(
                f"the token transport has {sizes[0]} ranks, the expert transport {sizes[1]}, the topology {sizes[2]}; "
                "give a topology of the group's size"
            )

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self.tokens.rank

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self.tokens.world_size


def single_rank_group() -> RankGroup:
    """A group of one, without a process group: what a layer has before it is sharded."""
    return RankGroup(LocalTransport(), LocalTransport(), Topology.preset("cpu", 1))


def group_of_process_group(
    group: dist.ProcessGroup, *, timeout_s: float, topology: Topology | None = None, transport: str = "auto"
) -> RankGroup:
    """The ranks of a torch process group. Collective: every rank of `group` must call it.

    `transport` names one of `moesaic.collectives.TRANSPORTS`; "auto" lets `choose_transport` name it.

    Without a `topology` the preset of the device is used, on the nodes that the ranks are found on. The preset, not a
    measurement, so that plans, and with them results, do not change from run to run.
    """
    on_cuda, node_of_R = dist.get_backend(group) == "nccl", nodes_of_group(group)
    if transport == "auto":
        transport = choose_transport(node_of_R, on_cuda=on_cuda).name
    tokens, experts = make_transports(transport, group, num_transports=2, timeout_s=timeout_s)
    return RankGroup(tokens, experts, topology or default_topology(node_of_R, on_cuda=on_cuda))


def default_topology(node_of_R: Sequence[int], *, on_cuda: bool) -> Topology:
    """The preset for this kind of device; one node where the ranks do not fill nodes of one size, one after the other."""
    num_ranks, num_nodes = len(node_of_R), len(set(node_of_R))
    ranks_per_node = num_ranks // num_nodes
    if list(node_of_R) != [rank // ranks_per_node for rank in range(num_ranks)]:
        ranks_per_node = num_ranks
    preset = "cpu"
    if on_cuda:
        major, _ = torch.cuda.get_device_capability()
        preset = {8: "a100", 9: "h100"}.get(major, "b200")
    return Topology.preset(preset, num_nodes=num_ranks // ranks_per_node, ranks_per_node=ranks_per_node)
