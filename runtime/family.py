"""The module's old name: what it had works for one release, with a warning; see `naming`."""

import warnings
from typing import Any

from torch import Tensor

from .naming import WeightNaming
from .renamed_members import RenamedMemberWarning


class _Family(WeightNaming):
    """A naming whose subclasses have the layout's methods by their old names."""

    def to_original(self, weight: str, tensor: Tensor) -> Tensor:
        """See `WeightNaming.to_original`."""
        return self.to_family(weight, tensor)

    def from_original(self, weight: str, tensor: Tensor) -> Tensor:
        """See `WeightNaming.from_original`."""
        return self.from_family(weight, tensor)

    def to_family(self, weight: str, tensor: Tensor) -> Tensor:
        """The old name of `to_original`."""
        return tensor

    def from_family(self, weight: str, tensor: Tensor) -> Tensor:
        """The old name of `from_original`."""
        return tensor


def __getattr__(name: str) -> Any:
    if name != "Family":
        raise AttributeError(name)
    text = "moesaic.runtime.family.Family is now moesaic.runtime.naming.WeightNaming; old names work for one more release"
    warnings.warn(text, RenamedMemberWarning, stacklevel=2)
    return _Family
