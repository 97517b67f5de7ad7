"""The routes of one forward's tokens, over one hop or two, and how tokens and results travel along them.

Combine is the transpose of dispatch, so each one's backward is the other's forward: tokens and the gradients of outputs go out by
`DispatchHandle.send`, results and the gradients of tokens come back by `DispatchHandle.send_back`. A token goes to a rank once,
however many of its experts are computed there, and its result comes back once, already summed over them. What a rank computes of
its own tokens never becomes a message: it is read from and added to the tokens' own tensors.

Layouts, on the source rank:
    assignment a = t * K + k                        as the router made them
    by destination: (destination, expert, token)    the order in which assignments are listed in the dispatch metadata
    sent tokens: (destination, token)               one for each other destination of each token
and on the destination rank:
    arriving tokens: (hop, sender, token)
    rank-major: (source, expert, token)             the order in which the dispatch metadata arrives
    expert-major: (expert, source, token)           the order of the expert stage: one contiguous group per local expert

    rank-major      rank 0: e0 e0 e1 | rank 1: e0 e1
    expert-major    e0: r0 r0 r1     | e1: r0 r1

Shape letters: T tokens, K choices, D model dim, A assignments of this rank (up to T * K), P tokens sent and Q tokens received
over a hop, N assignments computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from ...collectives import Pending, RowLayout, Transport, all_to_all_rows
from ...kernels import Bags, gather_rows, sum_rows
from .layouts import slices

Arrived = TypeVar("Arrived")


class InFlight(Generic[Arrived]):
    """Messages on their way, and what is made of them on arrival.

    Args:
        pending: waits for the messages.
        sent: the tensor sent, which must exist until then.
        take: computes the result from what arrived; called once. On a route of several hops it communicates.
    """

    __slots__ = ("_arrived", "_pending", "_sent", "_take")

    def __init__(self, pending: Pending, sent: Tensor, take: Callable[[], Arrived]):
        self._pending = pending
        self._sent: Tensor | None = sent
        self._take: Callable[[], Arrived] | None = take
        self._arrived: Arrived | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether `wait` has returned."""
        return self._take is None

    def wait(self) -> Arrived:
        """Wait for the messages and return the result; a second call returns the same."""
        if self._take is not None:
            self._pending.wait(until_sent=False)
            self._arrived = self._take()
            self._take = self._sent = None
        return cast(Arrived, self._arrived)


@dataclass(frozen=True, eq=False)
class Combined:
    """Sums per token [T, D] and, in backward, the gradients of the gate weights [T * K], in router order."""

    x_TD: Tensor
    gate_grads_A: Tensor | None


@dataclass(frozen=True, eq=False)
class Hop:
    """One exchange of tokens on the route to the ranks that compute them; results return over it.

    send_ids_P: the tokens that leave: own token t (t < T), or T + q for the q-th token that arrived over the hops before.
    layout: how many go to and come from each rank.
    return_bags_Q: the terms of each arriving token's result: row n of the expert-major outputs (n < N), or N + p for the p-th
        result that the next hop brings back.
    """

    send_ids_P: Tensor
    layout: RowLayout
    return_bags_Q: Bags


@dataclass(frozen=True, eq=False)
class GateRoute:
    """How one number per assignment, the gradient of its gate weight, returns to the source rank: in one exchange, unsummed.

    rank_major_N: the rank-major position of every expert-major row.
    ids_A: the assignments by destination.
    layout: rank-major to by destination, without this rank's own.
    own_computed, own_sent: the place of this rank's own assignments in rank-major order, and by destination.
    """

    rank_major_N: Tensor
    ids_A: Tensor
    layout: RowLayout
    own_computed: slice
    own_sent: slice


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """The routes of one forward's tokens; both directions of forward and backward follow them. Carries no gradient."""

    num_tokens: int  # T
    top_k: int  # K
    hops: tuple[Hop, ...]
    source_ids_N: Tensor  # the token of every expert-major row: own token t (t < T), or T + q for the q-th that arrived
    combine_bags_T: Bags  # the terms of each own token's result: expert-major rows (n < N), or N + p of the first hop
    gates: GateRoute
    gate_weights_N: Tensor  # of every expert-major row, fp32
    experts: tuple[int, ...]  # computed by this rank, ascending: the groups of the expert stage
    group_sizes: tuple[int, ...]  # expert-major rows of each

    def send(self, x_TD: Tensor, transport: Transport, op: str, where: str) -> InFlight[Tensor]:
        """Launch tokens [T, D] on the first hop; they arrive as expert-major rows [N, D]."""
        sizes = [hop.layout.num_received_rows for hop in self.hops]
        arrived = x_TD.new_empty(sum(sizes), x_TD.shape[1])

        def launch(index: int) -> tuple[Pending, Tensor]:
            hop = self.hops[index]
            outgoing = transport.empty((hop.send_ids_P.numel(), x_TD.shape[1]), x_TD)
            gather_rows(x_TD, hop.send_ids_P, beside=arrived if index else None, out=outgoing)
            received_QD = arrived[slices(sizes)[index]]
            return all_to_all_rows(transport, hop.layout, outgoing, received_QD, op=op, where=where), outgoing

        def take() -> Tensor:
            for index in range(1, len(self.hops)):
                pending, _ = launch(index)
                pending.wait(until_sent=False)
            return gather_rows(x_TD, self.source_ids_N, beside=arrived)

        return InFlight(*launch(0), take)

    def send_back(
        self, y_ND: Tensor, transport: Transport, op: str, where: str, gate_grads_N: Tensor | None = None
    ) -> InFlight[Combined]:
        """Return expert-major rows [N, D], summed per token on every rank they pass; the first hop's messages are in flight.

        With `gate_grads_N`, one number per expert-major row returns too.
        """
        returned: Tensor | None = None
        for hop in reversed(self.hops):
            outgoing = transport.empty((hop.layout.num_received_rows, y_ND.shape[1]), y_ND)
            sum_rows(y_ND, hop.return_bags_Q, beside=returned, out=outgoing)
            returned = y_ND.new_empty(hop.send_ids_P.numel(), y_ND.shape[1])
            pending = all_to_all_rows(transport, hop.layout.transpose, outgoing, returned, op=op, where=where)
            if hop is not self.hops[0]:
                pending.wait(until_sent=False)
        gates = None if gate_grads_N is None else self._send_gate_grads(gate_grads_N, transport, op, where)

        def take() -> Combined:
            gate_grads_A = None if gates is None else gates.wait()
            return Combined(sum_rows(y_ND, self.combine_bags_T, beside=returned), gate_grads_A)

        return InFlight(pending, outgoing, take)

    def _send_gate_grads(self, grads_N: Tensor, transport: Transport, op: str, where: str) -> InFlight[Tensor]:
        gates = self.gates
        rank_major = torch.empty_like(grads_N)
        rank_major[gates.rank_major_N] = grads_N
        by_destination = grads_N.new_empty(gates.ids_A.shape[0])

        def take() -> Tensor:
            by_destination[gates.own_sent] = rank_major[gates.own_computed]
            grads_A = grads_N.new_zeros(self.num_tokens * self.top_k)  # those of dropped assignments stay zero
            grads_A[gates.ids_A] = by_destination
            return grads_A

        pending = all_to_all_rows(transport, gates.layout, rank_major, by_destination, op=op, where=where)
        return InFlight(pending, rank_major, take)
