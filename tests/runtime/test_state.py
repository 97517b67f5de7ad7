"""State under logical names through torch.distributed.checkpoint: models and optimizers that are out of the ordinary."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, MoELayer, RuntimeConfig, shard_experts
from tests.helpers.compare import assert_bitwise
from tests.helpers.ranks import run_ranks
from tests.runtime.test_shard import whole

NUM_EXPERTS = 3


class TwoNames(nn.Module):
    """One MoE layer that is called twice, and known under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.first = MoELayer(8, 4, NUM_EXPERTS, 2)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.dense(x)))


def wrapped() -> tuple[nn.Module, Handle]:
    model = TwoNames()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return model, shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, timeout_s=60))


def through_a_checkpoint(rank: int, folder: str) -> list[str]:
    """Save, ruin every weight, load: everything is as it was. Returns the names."""
    model, handle = wrapped()
    saved = {key: whole(value).clone() for key, value in handle.state_dict().items()}
    dcp.save(handle.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state = handle.state_dict()
    dcp.load(state, checkpoint_id=folder)
    handle.load_state_dict(state)
    assert_bitwise({key: whole(value) for key, value in handle.state_dict().items()}, saved)
    return sorted(saved)


def test_experts_are_saved_under_logical_names_alone(tmp_path: object) -> None:
    """The bank is a submodule of its first layer, which `state_dict` shows under every name that the layer has."""
    names = run_ranks(2, through_a_checkpoint, str(tmp_path))
    experts = [{name for name in part if ".experts." in name} for part in names]
    assert experts[0] | experts[1] == {
        f"model.first.experts.{e}.{weight}" for e in range(NUM_EXPERTS) for weight in ("gate_up", "down")
    }
    assert not experts[0] & experts[1]
    assert not any(".bank." in name for part in names for name in part)
