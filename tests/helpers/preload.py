"""What takes a rank longest to begin with, done once in the process that all ranks are forked from.

No tensor is computed here: threads that torch starts for it would not survive the fork.
"""

import numpy as np
import torch._dynamo  # noqa: F401  # FSDP2 imports it when it is first used

# Each loads its compiled routines.
import moesaic.collectives.transports.shm_control
import moesaic.kernels.grouped_ffn_cpu
import moesaic.kernels.permute_cpu
import moesaic.kernels.swiglu_cpu
import moesaic.launch.train  # noqa: F401
from moesaic.collectives import choose_schedule
from moesaic.collectives.lifetime import end_with_parent
from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Problem, Topology, get_solver, split_exact

# Otherwise it would live as long as any rank does, and they as long as it.
end_with_parent()

# The planner loads its compiled routines when it is first used.
_LOAD = ExpertLoad(np.array([[900, 10, 10, 10], [900, 10, 10, 10]]))
_TOPOLOGY, _SHAPE = Topology.preset("cpu", 2), LayerShape(num_experts=4, top_k=1, dim=64, ffn_dim=64)
_PROBLEM = Problem(_LOAD, OwnerMap.contiguous(1, 4, 2).expert_to_owner_LE[0], _TOPOLOGY, _SHAPE, slots=2)
_PLACEMENT = get_solver("quota", keeps_owners=True)(_PROBLEM).placement
split_exact(_LOAD, _PLACEMENT, _TOPOLOGY)
choose_schedule(_PLACEMENT, _TOPOLOGY, _SHAPE)
