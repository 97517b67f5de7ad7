"""What a message is about, as a number that both of its ranks must have: operation, step, layer and pass.

    ("combine", "step 3, blocks.0.moe, plan 1, pass 0")  ->  1204398713

It travels where there is room for it that costs nothing: in the description of a message (shm), or as the library's own tag
(Gloo, MPI). NCCL has none. Ranks in different layers, or in different backward passes of one, then get an error and never each
other's rows.
"""

from zlib import crc32

_GATHER = "gather of"

DIFFERENT_PLACES = "the ranks are at different places of the program"
SAME_ORDER = "every rank must run the same layers in the same order, in forward and in backward"

# Pairs of a few passes of a large model.
_MOST_KNOWN = 4096


def gather_op(num_integers: int) -> str:
    """The operation of a gather's own messages. Wherever gathers are, those of one size have one tag: the ranks compare what the
    integers say. Gathers of different sizes have different tags.
    """
    return f"{_GATHER} {num_integers} integers"


class Tags:
    """The tags of one transport, and what this rank remembers of those it used.

    Args:
        largest: the largest tag that the library below takes.
    """

    def __init__(self, largest: int = 2**31 - 1):
        self._largest = largest
        self._known: dict[tuple[str, str], int] = {}

    def of(self, op: str, where: str) -> int:
        """The tag of an operation at a place."""
        tag = self._known.get((op, where))
        if tag is None:
            if len(self._known) >= _MOST_KNOWN:
                # Two threads may do so at once.
                self._known.pop(next(iter(self._known.copy())), None)
            tag = self._known[op, where] = self._number(op, where)
        return tag

    def named(self, tag: int) -> str:
        """What another rank's tag stands for: one of the operations of this rank, at one of its places."""
        ops, places = ({pair[i] for pair in self._known.copy()} for i in range(2))
        for op in sorted(ops):
            for where in sorted(places):
                if self._number(op, where) == tag:
                    return f"{op}{where and ' at ' + where}"
        return "something that this rank has not come to"

    def _number(self, op: str, where: str) -> int:
        text = op if op.startswith(_GATHER) else f"{op} at {where}"
        return 1 + crc32(text.encode()) % self._largest
