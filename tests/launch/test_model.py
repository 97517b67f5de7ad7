"""The demo model: shapes, causality, and initial weights that are a function of the seed."""

import math

import pytest
import torch
import torch.nn.functional as F

from moesaic import RouterConfig
from moesaic.launch.config import ModelConfig
from moesaic.launch.run.model import Rope, Transformer, apply_rope, build_model, rope_tables


def tiny_model(seed: int = 1, **values: int | bool) -> Transformer:
    config = ModelConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=24, num_experts=5, top_k=2, **values)  # type: ignore[arg-type]
    return build_model(config, RouterConfig(), seq_len=16, seed=seed)


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 16), (2, 7)])
def test_logits_for_every_byte_and_position(batch: int, length: int) -> None:
    """Any length up to the configured one; at the start the model knows nothing: ln 256 nats per byte, near enough."""
    logits_BLV = tiny_model()(random_ids(batch, length)).detach()
    assert logits_BLV.shape == (batch, length, 256)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), random_ids(batch, length).flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.3)


def test_a_byte_is_predicted_from_earlier_bytes_only() -> None:
    model, ids_BL = tiny_model(), random_ids(2, 16)
    changed_BL = ids_BL.clone()
    changed_BL[:, 9:] = 255 - changed_BL[:, 9:]
    before, after = model(ids_BL), model(changed_BL)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    """Equal for one seed whatever the global generator's state, which stays as it was; different for another seed."""
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = dict(tiny_model(seed=3).named_parameters())
    assert torch.random.get_rng_state().equal(state)
    torch.manual_seed(8)
    second = dict(tiny_model(seed=3).named_parameters())
    other = dict(tiny_model(seed=4).named_parameters())
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert parameter.equal(second[name]), name
        assert parameter.ndim == 1 or not parameter.equal(other[name]), name


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    for activation_checkpoint in (False, True):
        model = tiny_model(activation_checkpoint=activation_checkpoint)
        logits_BLV = model(random_ids(2, 16))
        F.cross_entropy(logits_BLV.flatten(0, 1), random_ids(2, 16).flatten()).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_rope_keeps_lengths_and_depends_on_distance_alone() -> None:
    """The product of a rotated query and key is the same at positions (3, 1) and (12, 10)."""
    rope = Rope(*rope_tables(16, 8, theta=100.0))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    q_LC, k_LC = apply_rope(q.expand(16, 8), rope), apply_rope(k.expand(16, 8), rope)
    torch.testing.assert_close(q_LC.norm(dim=1), q.norm().expand(16))
    torch.testing.assert_close(q_LC[3] @ k_LC[1], q_LC[12] @ k_LC[10])
    assert not torch.allclose(q_LC[3] @ k_LC[1], q_LC[3] @ k_LC[2])
