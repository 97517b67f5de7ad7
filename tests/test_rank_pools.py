"""Ranks that stay up from test to test hand nothing of one test to the next."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tests.helpers.ranks import run_ranks


def whole_sum(rank: int, num_groups: int) -> list[list[float]]:
    """Of two tensors over the last of these groups."""
    groups = [dist.new_group([0, 1]) for _ in range(num_groups)]
    x = DTensor.from_local(torch.ones(1, 2), DeviceMesh.from_group(groups[-1], "cpu"), [Shard(0)])
    return (x + x).full_tensor().tolist()


def test_results_of_dtensors_are_over_groups_that_exist() -> None:
    """torch keeps what an operation returned for an equal mesh, and meshes over other groups are equal."""
    for num_groups in (2, 1):
        assert run_ranks(2, whole_sum, num_groups) == [[[2.0, 2.0], [2.0, 2.0]]] * 2
