"""The seconds of other work ahead of a layer, under which its gathers travel: observed in its first forwards, agreed on once.

    launch of the gather | the attention before the layer, its router | gather of the loads | tokens | wait for the copies
                         '----------------- observed -----------------'

What comes after is not counted: ranks wait for each other there, and tokens travel on the links that the copies need.

Each rank observes its own seconds, on a device by the device's clock. Its median goes along with the loads that ranks gather
anyway, in one forward, and from that forward on all ranks plan with the least of them: the last rank to launch lets the gather
begin, and no rank computes before that one has routed. Where cores are scarce, or a device's units, a gather slows the work that
it travels beside, so that only a share counts, as calibration measured it. The result is rounded so coarsely that another run
mostly finds the same.
"""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import torch

from ...jit import run_seconds

# Of a layer's forwards in training the first are not observed, as memory and caches are cold; then so many are.
NUM_WARM_UP = 2
NUM_OBSERVED = 8


class Moment:
    """Now: on the host's clock, without compilation, or when the device's stream gets here."""

    def __init__(self, device: torch.device):
        self._host_s = run_seconds()
        self._event = None if device.type == "cpu" else torch.Event(device, enable_timing=True)
        if self._event is not None:
            self._event.record()

    def seconds_to(self, later: Moment) -> float:
        """Seconds from this moment to a later one; a device must have got there."""
        if self._event is None or later._event is None:
            return later._host_s - self._host_s
        return self._event.elapsed_time(later._event) / 1e3


class WorkAhead:
    """The work ahead of one layer, as one rank observes it.

    Args:
        is_observed: whether it is: False where nothing travels beside work, or nobody asks.
        hides: the share of a gather beside work that costs no time.
    """

    def __init__(self, *, is_observed: bool, hides: float):
        self._forwards_left = NUM_WARM_UP + NUM_OBSERVED + 1 if is_observed else 0
        self._seconds: list[float] = []
        self._hides = hides

    @property
    def is_observed(self) -> bool:
        """Whether ranks have not agreed yet, and will."""
        return self._forwards_left > 0

    def moment(self, device: torch.device) -> Moment | None:
        """Now; None where nothing is observed, or nothing any more."""
        return Moment(device) if self.is_observed else None

    @property
    def own_ns(self) -> int:
        """What this rank has observed, in nanoseconds, in the forward in which ranks agree; 0 in those before and after."""
        return round(median(self._seconds) * 1e9) if self._forwards_left == 1 else 0

    def observe(self, launched: Moment, routed: Moment, own_ns_R: np.ndarray) -> float | None:
        """Close a forward in training whose loads were gathered, and with them `own_ns` of every rank.

        Returns the seconds that ranks agree on, in the forward in which they do. The host has waited for the loads, and so for
        both moments.
        """
        self._forwards_left -= 1
        if not self._forwards_left:
            return rounded(self._hides * float(own_ns_R.min()) * 1e-9)
        if self._forwards_left <= NUM_OBSERVED:
            self._seconds.append(max(launched.seconds_to(routed), 0.0))
        return None


def rounded(seconds: float) -> float:
    """To two significant bits: to 1, 1.5, 2, 3, 4, 6, ... times a power of two.

    Example: 21 becomes 24, which is 1.5 * 16, and 19 becomes 16.
    """
    mantissa, exponent = math.frexp(seconds)
    return math.ldexp(round(4 * mantissa), exponent - 2)
