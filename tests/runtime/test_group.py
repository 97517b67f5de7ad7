"""What the planner is told of the machine: the nodes that ranks were found on."""

import pytest

from moesaic.runtime.group import default_topology


@pytest.mark.parametrize(
    "node_of_R,num_nodes,ranks_per_node",
    [
        ([0], 1, 1),
        ([0, 0, 0], 1, 3),
        ([0, 0, 1, 1], 2, 2),
        ([0, 1, 2], 3, 1),
        ([0, 1, 0, 1], 1, 4),  # not one after the other
        ([0, 0, 1], 1, 3),  # not of one size
    ],
)
def test_the_nodes_of_the_topology(node_of_R: list[int], num_nodes: int, ranks_per_node: int) -> None:
    topology = default_topology(node_of_R, on_cuda=False)
    assert (topology.num_nodes, topology.ranks_per_node) == (num_nodes, ranks_per_node)
