"""What the messages of an exchange move, and the words of errors for how far it came."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..messages import Buffer


class Part(NamedTuple):
    """What one message moves, or (`peer` is None) what a collective of a library does."""

    num_bytes: int
    peer: int | None
    is_incoming: bool

    def __str__(self) -> str:
        ranks = "all ranks" if self.peer is None else f"rank {self.peer}"
        return f"{self.num_bytes} B {'from' if self.is_incoming else 'to'} {ranks}"


def parts_of(sends: Sequence[Buffer], recvs: Sequence[Buffer]) -> list[Part]:
    """The messages of an exchange, those received first."""
    received = [Part(tensor.nbytes, peer, True) for tensor, peer in recvs]
    return received + [Part(tensor.nbytes, peer, False) for tensor, peer in sends]


def progress(parts: Collection[Part], missing: Collection[Part]) -> str:
    """How far an exchange came. Example: "received 24 of 40 B, 16 B from rank 2 are missing, 8 B to rank 1 were not taken"."""
    expected, absent = (sum(part.num_bytes for part in some if part.is_incoming) for some in (parts, missing))
    lacking = (f"{part} {'are missing' if part.is_incoming else 'were not taken'}" for part in missing)
    return ", ".join([f"received {expected - absent} of {expected} B", *lacking])
