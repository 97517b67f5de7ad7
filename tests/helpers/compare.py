"""Comparison of tensors by name, relative to the largest value that is expected."""

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_close(name: str, actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Every element within `rtol` of the expected tensor's largest magnitude (or of 1e-3, if that is smaller)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-3)
    assert error <= rtol * scale, f"{name}: off by {error:.3g} where the largest is {scale:.3g} (allowed {rtol:g} of it)"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    """The same names, every tensor close."""
    assert actual.keys() == expected.keys(), (
        f"only here {actual.keys() - expected.keys()}, missing {expected.keys() - actual.keys()}"
    )
    for name in expected:
        assert_close(name, actual[name], expected[name], rtol)


def assert_bitwise(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, every bit equal."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), (
            f"{name} differs, by at most {(actual[name] - expected[name]).abs().max():.3g}"
        )
