"""The round trip of one forward's tokens, or of their gradients in its backward: out to their experts and back.

    send | other work on the host and device | wait | experts | send back | other work | combine

Tokens travel under what runs between the launch and the wait: the shared experts in forward, their backward on the way back of
the gradients (autograd runs nodes that were made later first). Whatever that work issues on other groups, such as FSDP2's
gathers, every rank issues between the same launch and the same wait, so all ranks enter all communicators in one order, which
NCCL requires of communicators that are in use at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from ...collectives import Transport
from .handle import Combined, DispatchHandle, InFlight


@dataclass(frozen=True, eq=False)
class Direction:
    """One way of a round trip: its stage in the step, and the name of its traffic."""

    stage: str
    op: str


class TokenExchange:
    """One round trip.

    Args:
        handle: the routes.
        transport: carries the tokens.
        out, back: both ways.
        where: step, layer and pass, for errors and the tags of messages.
        clock: the clock of a stage, by its name and whether the stage is over at the end of the context.
        overlap: False waits right after every launch.
    """

    def __init__(
        self,
        handle: DispatchHandle,
        transport: Transport,
        out: Direction,
        back: Direction,
        where: str,
        clock: Callable[[str, bool], AbstractContextManager[None]],
        *,
        overlap: bool,
    ):
        self._handle, self._transport = handle, transport
        self._out, self._back, self._where = out, back, where
        self._clock, self._overlap = clock, overlap
        self._tokens: InFlight[Tensor] | None = None
        self._results: tuple[Tensor, Tensor | None] | None = None
        self._returning: InFlight[Combined] | None = None

    def send(self, x_TD: Tensor) -> None:
        """Launch tokens [T, D], or gradients of outputs, to the ranks that compute them."""
        with self._clock(self._out.stage, False):
            self._tokens = self._handle.send(x_TD, self._transport, self._out.op, self._where)
            self._transport.traffic.unfinished = self
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """Wait for the tokens of this rank's experts."""
        assert self._tokens is not None
        if not self._tokens.has_arrived:
            with self._clock(self._out.stage, True):
                self._tokens.wait()
            self._transport.traffic.finished(self)

    def take(self) -> Tensor:
        """The tokens of this rank's experts, expert-major [N, D]; nothing else holds them afterwards."""
        self.wait()
        assert self._tokens is not None
        tokens, self._tokens = self._tokens, None
        return tokens.wait()

    def send_back(self, y_ND: Tensor, gate_grads_N: Tensor | None = None, *, launch: bool = True) -> None:
        """Launch the experts' outputs, or gradients of tokens and gate weights, back to the source ranks.

        `launch=False` leaves that to `combine`: a recomputation may end before it.
        """
        self._results = y_ND, gate_grads_N
        if launch:
            self._launch_back()

    def _launch_back(self) -> None:
        assert self._results is not None
        with self._clock(self._back.stage, False):
            y_ND, gate_grads_N = self._results
            self._returning = self._handle.send_back(y_ND, self._transport, self._back.op, self._where, gate_grads_N)
            self._transport.traffic.unfinished = self
            if not self._overlap:
                self.drain()

    def combine(self) -> Combined:
        """Wait for the results of this rank's tokens, summed over their experts."""
        if self._returning is None:
            self._launch_back()
        assert self._returning is not None
        with self._clock(self._back.stage, True):
            combined = self._returning.wait()
            self._transport.traffic.finished(self)
        self._results = self._returning = None
        return combined

    def drain(self) -> None:
        """Wait for what is in flight; see `collectives.traffic.Unfinished`."""
        for messages in (self._tokens, self._returning):
            if messages is not None:
                messages.wait()
        self._transport.traffic.finished(self)


def drain_unfinished(transport: Transport) -> None:
    """Complete the exchange, if any, that a forward or backward which broke off has left on its way.

    A recomputation likewise completes what the backward that asked for it is still to wait for.
    """
    unfinished, transport.traffic.unfinished = transport.traffic.unfinished, None
    if unfinished is not None:
        unfinished.drain()
