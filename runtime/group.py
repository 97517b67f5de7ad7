"""The ranks that share experts: their transports, and the topology that the planner prices with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..collectives import (
    LocalTransport,
    Transport,
    choose_transport,
    make_host_transport,
    make_transports,
    new_group,
    nodes_of_group,
)
from ..placement import Topology
from ..placement.machine import Machine
from ._compat import time_limit_s


@dataclass(frozen=True, eq=False)
class RankGroup:
    """The ranks of one FSSDP group, and this rank's replicas in groups that train other tokens beside it.

    Routed tokens and expert weights travel on transports of their own, so that copies in flight for the next layer are
    never mistaken for the tokens of this one.
    """

    tokens: Transport
    experts: Transport
    topology: Topology
    replicas: Transport = field(default_factory=LocalTransport)
    """The ranks that own what this one owns, one in each group."""
    replica_topology: Topology = field(default_factory=lambda: Topology.preset("cpu", 1))
    host: Transport | None = None
    """Of tensors in the host's memory, where the tokens are not."""

    def __post_init__(self) -> None:
        if self.replicas.world_size != self.replica_topology.num_ranks:
            raise ValueError(f"{self.replicas.world_size} replicas on a topology of {self.replica_topology.num_ranks} ranks")
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

    @property
    def control(self) -> Transport:
        """Gathers in the host's memory; on CPU the transport of the tokens, which finds ranks at other places of the program."""
        return self.host or self.tokens

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank, of all groups, that decides and writes what is decided and written once."""
        return self.rank == self.replicas.rank == 0


def single_rank_group() -> RankGroup:
    """A group of one, without a process group: what a layer has before it is sharded."""
    return RankGroup(LocalTransport(), LocalTransport(), Topology.preset("cpu", 1))


def group_of_process_group(
    group: dist.ProcessGroup,
    *,
    timeout_s: float,
    topology: Topology | None = None,
    machine: Machine | None = None,
    transport: str = "auto",
    replicas: dist.ProcessGroup | None = None,
) -> RankGroup:
    """The ranks of a torch process group. Collective: every rank of `group`, and of `replicas`, must call it.

    `transport` names one of `moesaic.collectives.TRANSPORTS`; "auto" lets `choose_transport` name it.

    Without a `topology` the rates of `machine` are used, by default the preset of the device, on the nodes that the ranks are
    found on. A file or the preset, not a measurement now, so that plans, and with them results, do not change from run to run.
    """
    on_cuda, node_of_R = dist.get_backend(group) == "nccl", nodes_of_group(group)
    name = choose_transport(node_of_R, on_cuda=on_cuda).name if transport == "auto" else transport
    tokens, experts = make_transports(name, group, num_transports=2, timeout_s=timeout_s)
    if topology is None:
        topology = default_topology(node_of_R, on_cuda=on_cuda, machine=machine)
        if dist.get_process_group_ranks(group) != list(range(dist.get_world_size())):
            # The file numbers the ranks and nodes of a whole run.
            topology = replace(topology, rank_costs=(), node_costs=())
    host = make_host_transport(group, node_of_R, timeout_s=timeout_s) if on_cuda else None
    if replicas is None:
        return RankGroup(tokens, experts, topology, host=host)
    node_of_R = nodes_of_group(replicas)
    name = choose_transport(node_of_R, on_cuda=on_cuda).name if transport == "auto" else transport
    (between,) = make_transports(name, replicas, num_transports=1, timeout_s=timeout_s)
    return RankGroup(tokens, experts, topology, between, default_topology(node_of_R, on_cuda=on_cuda), host)


def default_topology(node_of_R: Sequence[int], *, on_cuda: bool, machine: Machine | None = None) -> Topology:
    """That of the machine, else of the preset for this kind of device; one node where the ranks do not fill nodes of one size,
    one after the other.

    Raises:
        ValueError: the machine file lacks a rate for these nodes.
    """
    num_ranks, num_nodes = len(node_of_R), len(set(node_of_R))
    ranks_per_node = num_ranks // num_nodes
    if list(node_of_R) != [rank // ranks_per_node for rank in range(num_ranks)]:
        ranks_per_node = num_ranks
    if machine is not None:
        return machine.topology(num_ranks // ranks_per_node, ranks_per_node)
    preset = "cpu"
    if on_cuda:
        major, _ = torch.cuda.get_device_capability()
        preset = {8: "a100", 9: "h100"}.get(major, "b200")
    return Topology.preset(preset, num_nodes=num_ranks // ranks_per_node, ranks_per_node=ranks_per_node)


def mesh_with_limit(mesh: DeviceMesh, timeout_s: float) -> DeviceMesh:
    """The mesh, or where its groups wait longer than `timeout_s`, its equal over groups of their own, which do not. Collective.

    A mesh over all ranks usually has the default process group, of which its user may expect the usual half an hour.
    """
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    limits_s = [time_limit_s(group, mesh.device_type) for group in groups]
    if all(limit_s <= timeout_s for limit_s in limits_s):
        return mesh
    own = [
        new_group(dist.get_process_group_ranks(group), min(limit_s, timeout_s))
        for group, limit_s in zip(groups, limits_s, strict=True)
    ]
    names = mesh.mesh_dim_names
    return DeviceMesh.from_group(own if mesh.ndim > 1 else own[0], mesh.device_type, mesh=mesh.mesh, mesh_dim_names=names)
