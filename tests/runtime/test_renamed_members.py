"""Old names of members: they mean the new ones, with a warning that gives them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic import Handle, MoELayer, RuntimeConfig
from moesaic.runtime.group import single_rank_group
from moesaic.runtime.naming import WeightNaming
from moesaic.runtime.renamed_members import RenamedMemberWarning
from moesaic.runtime.stages import StageClock
from tests.helpers.cases import share_experts

OF_HANDLE = {
    "rehome": "migrate",
    "rehomings": "telemetry.migrations",
    "loads": "telemetry.loads",
    "layer_loads": "telemetry.layer_loads",
    "layer_metrics": "telemetry.layer_metrics",
    "memory": "telemetry.memory",
    "profile": "telemetry.profile",
    "last_stage": "telemetry.last_stage",
    "clock": "telemetry.clock",
    "family_state_dict": "weights.state_dict",
    "load_family_state_dict": "weights.load_state_dict",
    "save_safetensors": "weights.save_safetensors",
    "load_safetensors": "weights.load_safetensors",
    "banks": "_banks",
    "group": "_group",
    "config": "_config",
}


def make_handle() -> Handle:
    """On one process."""
    layer, config, clock = MoELayer(4, 6, 4, 2), RuntimeConfig(policy="static", slots=0), StageClock()
    group = single_rank_group()
    banks = share_experts({"": layer}, group, config=config, clock=clock)
    return Handle(layer, {"": layer.experts}, banks, group, config, clock)


def reach(holder: Any, path: str) -> Any:
    for name in path.split("."):
        holder = getattr(holder, name)
    return holder


@pytest.mark.parametrize("old, new", OF_HANDLE.items(), ids=OF_HANDLE)
def test_a_member_of_the_handle(old: str, new: str) -> None:
    handle = make_handle()
    message = rf"^Handle\.{old} is now Handle\.{re.escape(new)}; old names work for one more release$"
    with pytest.warns(RenamedMemberWarning, match=message) as seen:
        assert getattr(handle, old) == reach(handle, new)
    assert [warning.filename for warning in seen] == [__file__]


def test_owner_maps_by_their_old_name() -> None:
    handle = make_handle()
    with pytest.warns(RenamedMemberWarning, match=r"^Handle\.placement is now Handle\.owner_maps;"):
        assert handle.placement == handle.owner_maps  # type: ignore[attr-defined]


def test_an_old_name_is_called_as_before(tmp_path: Path) -> None:
    handle = make_handle()
    with pytest.warns(RenamedMemberWarning):
        state = handle.family_state_dict()  # type: ignore[attr-defined]
    assert state.keys() == handle.weights.state_dict().keys() and all(type(tensor) is torch.Tensor for tensor in state.values())
    with pytest.warns(RenamedMemberWarning), handle.profile(tmp_path / "profile.json"):  # type: ignore[attr-defined]
        pass
    assert (tmp_path / "profile.json").exists()


def test_the_handle_is_small() -> None:
    """What a loop calls; a new member is a decision."""
    handle = make_handle()
    methods = {name for name, value in vars(Handle).items() if not name.startswith("_") and name not in (*OF_HANDLE, "placement")}
    assert methods | {name for name in vars(handle) if not name.startswith("_")} == {
        "model",
        "layers",
        "owner_maps",
        "weights",
        "telemetry",
        "parameters",
        "parameter_groups",
        "record",
        "expert_parameters",
        "aux_loss",
        "clip_grad_norm_",
        "set_requires_all_reduce",
        "step",
        "migrate",
        "metrics",
        "state_dict",
        "load_state_dict",
        "prepare_optimizer",
    }


def test_the_naming_of_weights_by_its_old_name() -> None:
    """Of a layer and of its experts, read and set; and a subclass whose methods have their old names."""
    with pytest.warns(
        RenamedMemberWarning, match=r"runtime\.family\.Family is now moesaic\.runtime\.naming\.WeightNaming;"
    ) as seen:
        from moesaic.runtime.family import Family
    assert [warning.filename for warning in seen] == [__file__]

    class Transposed(Family):  # type: ignore[misc, valid-type]
        def to_family(self, weight: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.mT

        def from_family(self, weight: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.mT

    naming, layer = Transposed(fused=(("down", "w2"),)), MoELayer(4, 6, 4, 2)
    assert isinstance(naming, WeightNaming) and naming == Transposed(fused=(("down", "w2"),))
    assert naming.to_original("down", torch.empty(2, 3)).shape == naming.from_original("down", torch.empty(2, 3)).shape == (3, 2)
    with pytest.warns(RenamedMemberWarning, match=r"^ShardedExperts\.family is now ShardedExperts\.naming;"):
        layer.experts.family = naming
    assert layer.experts.naming is naming
    with pytest.warns(RenamedMemberWarning, match=r"^MoELayer\.family is now MoELayer\.naming;"):
        assert layer.family is naming
