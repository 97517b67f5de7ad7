"""Control segments: what each rank of one node publishes to the others, and the compiled loops that write and read it.

Every rank has one control segment that all others map. It alone writes its rings of posted messages, its marks of what it took
from others, and its board of integers. What others write there is its doorbell, a semaphore, and the word that says whether it
must be rung: the rank that clears that word rings. Import this module lazily: it imports numba, and a first call compiles.

Messages of an exchange are rows of one int64 array, those sent before those expected; shapes: R ranks, M messages, G segments
of a rank.
"""

# The compiler gives the loops their types, which Python annotations cannot say.
# mypy: ignore-errors

from __future__ import annotations

import ctypes

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...jit.decorators import njit
from ...kernels.cpu.memory import copy_bytes, fence, stream_bytes
from .shm_memory import Segment

RING = 512
MAX_SEGMENTS = 64
MAX_INTS = 4096

# Where things lie in a control segment, in bytes. The doorbell at 0 is a sem_t, which has 32 bytes on 64-bit Linux.
_IS_WAITING = 64
_INCOMING = 72  # bytes of the exchange that this rank reads, or will next
_NUM_SEGMENTS = 128
_SEGMENTS = _NUM_SEGMENTS + 8  # [MAX_SEGMENTS] file descriptor, bytes
_BOARD_NUMBERS = _SEGMENTS + 16 * MAX_SEGMENTS  # [2]
_BOARD_SIZES = _BOARD_NUMBERS + 16  # [2] integers shown
_BOARDS = _BOARD_SIZES + 16  # [2, MAX_INTS]
_RINGS = -(-(_BOARDS + 16 * MAX_INTS) // 64) * 64  # [R, RING] posted messages: number + 1, tag and segment, offset, bytes
_POSTED_BYTES = 32
# A word with both: the tag, and the segment in so many bits.
_SEGMENT_BITS = 8

# From here on it matters whether a message goes past the caches, and not that everyone is asked.
_STREAMED_BYTES = 64 << 10

# Columns of messages that are sent and expected. The last of the latter says whether the message was read.
PEER, NUMBER, TAGGED_SEGMENT, OFFSET, SENT_BYTES = range(5)
ADDRESS, NBYTES, IS_READ = range(2, 5)

# Rows of the counts of messages by peer.
SENT, POSTED, EXPECTED = range(3)

# What `launch` and `advance` return.
DONE, NOT_YET, NEW_SEGMENT, UNLIKE, UNREACHABLE = range(5)


class Control:
    """Python's views on one rank's control segment."""

    def __init__(self, segment: Segment):
        self.segment = segment
        words = segment.memory.cast("q")
        self.is_waiting = words[_IS_WAITING // 8 :][:1]
        self.num_segments = words[_NUM_SEGMENTS // 8 :][:1]
        self.segments = words[_SEGMENTS // 8 :][: 2 * MAX_SEGMENTS]
        self.board_sizes = words[_BOARD_SIZES // 8 :][:2]
        self.boards = torch.frombuffer(words[_BOARDS // 8 :][: 2 * MAX_INTS], dtype=torch.int64).view(2, MAX_INTS)
        self.doorbell = ctypes.c_void_p(segment.address)

    @staticmethod
    def nbytes(world_size: int) -> int:
        """Size of a control segment."""
        return _RINGS + world_size * RING * (_POSTED_BYTES + 8)


_c_int = types.int32
_sched_yield = types.ExternalFunction("sched_yield", _c_int())
_sem_post = types.ExternalFunction("sem_post", _c_int(types.intp))
_clock_gettime = types.ExternalFunction("clock_gettime", _c_int(_c_int, types.intp))
_CLOCK_MONOTONIC = 1
_WORD = ir.IntType(64)


@intrinsic
def _load(typingctx, address):
    """The word at an address; what its writer wrote before it is visible after."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], _WORD.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store(typingctx, address, value):
    """Write a word; a reader that sees it sees all that was written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], _WORD.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _swap(typingctx, address, value):
    """Write a word and return the one before, in one step."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _called_from_python(signature):
    """Compile a function for these arguments, and call it without finding out, every time, that they are these.

    Finding out takes longer than the rest of a short call. The caller sees to it: an array of another type is taken for one of
    this.
    """

    def compiled(function):
        dispatcher = njit(signature, cache=True, nogil=True)(function)
        return dispatcher.overloads[dispatcher.signatures[0]].entry_point

    return compiled


@njit(cache=True, nogil=True)
def _wake(control):
    """Ring a rank that sleeps or is about to; a fence must lie between what it waits for and this."""
    if _load(control + _IS_WAITING) and _swap(control + _IS_WAITING, 0):
        _sem_post(control)


@njit(cache=True, nogil=True)
def _slot(rank, number):
    """Which of all ring places of a segment belongs to the message of that number to or from `rank`."""
    return rank * RING + number % RING


@njit(cache=True, nogil=True)
def _mark_of(controls_R, reader, sender, number):
    """Address of the word by which `reader` says that it took a message."""
    return controls_R[reader] + _RINGS + controls_R.size * RING * _POSTED_BYTES + 8 * _slot(sender, number)


@njit(cache=True, nogil=True)
def _now_ns(clock):
    _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    return clock[0] * 1_000_000_000 + clock[1]


@njit(cache=True, nogil=True)
def _clock_for(spin_ns, patience_ns):
    """Room for a timespec, the time of the next yield, and how far apart they are; and when `spin_ns` from now are over."""
    clock = np.zeros(4, np.int64)
    now_ns = _now_ns(clock)
    clock[2], clock[3] = now_ns + patience_ns, patience_ns
    return clock, now_ns + spin_ns


@njit(cache=True, nogil=True)
def _is_over(clock, until_ns):
    """Whether it is `until_ns`; if not, the core is yielded, unless that was done just now."""
    now_ns = _now_ns(clock)
    if now_ns >= until_ns:
        return True
    if now_ns >= clock[2]:
        _sched_yield()
        clock[2] = _now_ns(clock) + clock[3]
    return False


@njit("boolean(int64[::1], int64, int64[:, ::1], int64[:, ::1], int64)", cache=True, nogil=True)
def post(controls_R, rank, counts_3R, messages_M5, num_sends):
    """Describe messages to their receivers, in turn, as far as rings have room; returns whether all of them are."""
    all_posted = True
    for m in range(num_sends):
        peer, number = messages_M5[m, PEER], messages_M5[m, NUMBER]
        if number < counts_3R[POSTED, peer]:
            continue
        has_room = number < RING or _load(_mark_of(controls_R, peer, rank, number - RING)) > number - RING
        if number > counts_3R[POSTED, peer] or not has_room:
            all_posted = False
            continue
        posted = controls_R[rank] + _RINGS + _POSTED_BYTES * _slot(peer, number)
        _store(posted + 8, messages_M5[m, TAGGED_SEGMENT])
        _store(posted + 16, messages_M5[m, OFFSET])
        _store(posted + 24, messages_M5[m, SENT_BYTES])
        _store(posted, number + 1)
        counts_3R[POSTED, peer] = number + 1
    fence()
    for m in range(num_sends):
        _wake(controls_R[messages_M5[m, PEER]])
    return all_posted


@njit(cache=True, nogil=True)
def _announce(controls_R, rank, num_bytes):
    """Publish how many bytes this rank reads, before its messages appear."""
    _store(controls_R[rank] + _INCOMING, num_bytes)


@njit("int64(int64[:, ::1], int64)", cache=True, nogil=True)
def place(own_G2, address):
    """The number of this rank's segment in which an address lies; -1 if it lies in none."""
    for g in range(own_G2.shape[0]):
        if own_G2[g, 0] <= address < own_G2[g, 0] + own_G2[g, 1]:
            return g
        if own_G2[g, 0] == 0:
            break
    return -1


@_called_from_python(
    "int64(int64[::1], int64, int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64, int64, int64, int64,"
    " int64, int64[:, ::1])"
)
def launch(controls_R, rank, own_G2, counts_3R, traffic_2R, parts_M3, num_sends, outgoing, incoming, row_bytes, tag, messages_M5):
    """Number the messages of an exchange and describe those that are sent, as far as there is room in their receivers' rings.

    Parts are (peer, first row, rows) of rows of `row_bytes` at the addresses `outgoing`, for the first `num_sends`, and
    `incoming`. All are about `tag`. What is sent is added to the bytes and messages of `traffic_2R`. Returns DONE; NOT_YET where
    `post` must go on; or UNREACHABLE, and nothing is done, where what is sent lies in no segment of this rank.
    """
    for m in range(num_sends):
        if place(own_G2, outgoing + parts_M3[m, 1] * row_bytes) < 0:
            return UNREACHABLE
    _announce(controls_R, rank, parts_M3[num_sends:, 2].sum() * row_bytes)
    for m in range(parts_M3.shape[0]):
        peer, start, nbytes = parts_M3[m, 0], parts_M3[m, 1] * row_bytes, parts_M3[m, 2] * row_bytes
        messages_M5[m, PEER] = peer
        if m < num_sends:
            segment = place(own_G2, outgoing + start)
            messages_M5[m, NUMBER] = counts_3R[SENT, peer]
            messages_M5[m, TAGGED_SEGMENT] = tag << _SEGMENT_BITS | segment
            messages_M5[m, OFFSET] = outgoing + start - own_G2[segment, 0]
            messages_M5[m, SENT_BYTES] = nbytes
            counts_3R[SENT, peer] += 1
            traffic_2R[0, peer] += nbytes
            traffic_2R[1, peer] += 1
        else:
            messages_M5[m, NUMBER] = counts_3R[EXPECTED, peer]
            messages_M5[m, ADDRESS], messages_M5[m, NBYTES], messages_M5[m, IS_READ] = incoming + start, nbytes, 0
            counts_3R[EXPECTED, peer] += 1
    return DONE if num_sends == 0 or post(controls_R, rank, counts_3R, messages_M5, num_sends) else NOT_YET


@njit("boolean(int64[::1], int64, int64, int64)", cache=True, nogil=True)
def was_taken(controls_R, rank, peer, number):
    """Whether `peer` has read a message of this rank."""
    return _load(_mark_of(controls_R, peer, rank, number)) > number


@njit("UniTuple(int64, 4)(int64[::1], int64, int64[:, ::1], int64)", cache=True, nogil=True)
def unlike(controls_R, rank, expected_Q5, tag):
    """The first message that is not what was expected: its peer, tag and bytes, and the bytes expected; zeros without one."""
    for q in range(expected_Q5.shape[0]):
        peer, number = expected_Q5[q, PEER], expected_Q5[q, NUMBER]
        posted = controls_R[peer] + _RINGS + _POSTED_BYTES * _slot(rank, number)
        if not expected_Q5[q, IS_READ] and _load(posted) == number + 1:
            there, nbytes = _load(posted + 8) >> _SEGMENT_BITS, _load(posted + 24)
            if there != tag or nbytes != expected_Q5[q, NBYTES]:
                return peer, there, nbytes, expected_Q5[q, NBYTES]
    return 0, 0, 0, 0


@njit("boolean(int64[::1], int64, int64[:, ::1], int64)", cache=True, nogil=True)
def all_taken(controls_R, rank, messages_M5, num_sends):
    """Whether every receiver has read its messages."""
    for m in range(num_sends):  # noqa: SIM110 (the compiler takes no generator)
        if not was_taken(controls_R, rank, messages_M5[m, PEER], messages_M5[m, NUMBER]):
            return False
    return True


@njit(cache=True, nogil=True)
def _outgrows(controls_R, cache_bytes):
    """Whether what all ranks read now, and where they put it, would fill `cache_bytes`; up to there copies are faster in them."""
    num_bytes = 0
    for rank in range(controls_R.size):
        num_bytes += 2 * _load(controls_R[rank] + _INCOMING)
    return num_bytes >= cache_bytes


@njit(cache=True, nogil=True)
def _read(controls_R, rank, bases_RG, cache_bytes, messages_M5, num_sends, tag):
    """Copy in what is there and was not read; see `advance` for what is returned."""
    status, last_read = DONE, -1
    for m in range(num_sends, messages_M5.shape[0]):
        if messages_M5[m, IS_READ]:
            continue
        peer, number = messages_M5[m, PEER], messages_M5[m, NUMBER]
        posted = controls_R[peer] + _RINGS + _POSTED_BYTES * _slot(rank, number)
        if _load(posted) != number + 1:
            status = max(status, NOT_YET)
            continue
        tagged = _load(posted + 8)
        if tagged >> _SEGMENT_BITS != tag or _load(posted + 24) != messages_M5[m, NBYTES]:
            status = max(status, UNLIKE)
            continue
        base = bases_RG[peer, tagged & ((1 << _SEGMENT_BITS) - 1)]
        if base == 0:
            status = max(status, NEW_SEGMENT)
            continue
        target, source, nbytes = messages_M5[m, ADDRESS], base + _load(posted + 16), messages_M5[m, NBYTES]
        if nbytes >= _STREAMED_BYTES and _outgrows(controls_R, cache_bytes):
            stream_bytes(target, source, nbytes)
        else:
            copy_bytes(target, source, nbytes)
        _store(_mark_of(controls_R, rank, peer, number), number + 1)
        messages_M5[m, IS_READ] = 1
        last_read = m
    if last_read >= 0:
        fence()
        for m in range(num_sends, last_read + 1):
            _wake(controls_R[messages_M5[m, PEER]])
    return status


@njit(cache=True, nogil=True)
def _advance(controls_R, rank, bases_RG, cache_bytes, messages_M5, num_sends, tag, until_taken):
    """One look of `advance`."""
    status = _read(controls_R, rank, bases_RG, cache_bytes, messages_M5, num_sends, tag)
    if status == DONE and until_taken and not all_taken(controls_R, rank, messages_M5, num_sends):
        return NOT_YET
    return status


@_called_from_python("int64(int64[::1], int64, int64[:, ::1], int64, int64, int64[:, ::1], int64, int64, boolean, int64)")
def advance(controls_R, rank, bases_RG, cache_bytes, patience_ns, messages_M5, num_sends, tag, until_taken, spin_ns):
    """Read every message as it appears, then see whether those sent were taken; give up `spin_ns` after the first look.

    Returns DONE; NOT_YET; NEW_SEGMENT where a message lies in a segment that `bases_RG`, their addresses here, lacks; or UNLIKE
    where one is not about `tag`, or has other bytes than expected. A rank that keeps looking yields its core every
    `patience_ns`. What all ranks read goes past the caches, of `cache_bytes`, where it would fill them: lines of a target are
    read before they are overwritten there.
    """
    _announce(controls_R, rank, messages_M5[num_sends:, NBYTES].sum())
    status = _advance(controls_R, rank, bases_RG, cache_bytes, messages_M5, num_sends, tag, until_taken)
    if status != NOT_YET or spin_ns == 0:
        return status
    clock, until_ns = _clock_for(spin_ns, patience_ns)
    while status == NOT_YET and not _is_over(clock, until_ns):
        status = _advance(controls_R, rank, bases_RG, cache_bytes, messages_M5, num_sends, tag, until_taken)
    return status


@njit("void(int64[::1], int64, int64)", cache=True, nogil=True)
def show(controls_R, rank, number):
    """Let everyone see this rank's board under `number`."""
    _store(controls_R[rank] + _BOARD_NUMBERS + 8 * (number % 2), number)
    fence()
    for peer in range(controls_R.size):
        if peer != rank:
            _wake(controls_R[peer])


@njit("boolean(int64[::1], int64, int64)", cache=True, nogil=True)
def shows(controls_R, rank, number):
    """Whether the board of `rank` shows `number`."""
    return _load(controls_R[rank] + _BOARD_NUMBERS + 8 * (number % 2)) == number


@njit("boolean(int64[::1], int64, int64, int64)", cache=True, nogil=True)
def all_show(controls_R, number, spin_ns, patience_ns):
    """Whether all boards show `number`; gives up `spin_ns` after the first look. As for yields, see `advance`."""
    clock, until_ns = _clock_for(spin_ns, patience_ns)
    rank = 0
    while True:
        while rank < controls_R.size and shows(controls_R, rank, number):
            rank += 1
        if rank == controls_R.size:
            return True
        if _is_over(clock, until_ns):
            return False


@njit("void(int64)", cache=True, nogil=True)
def ask_to_be_woken(control):
    """Announce that this rank is about to sleep. It must look once more after this: what appeared before does not ring it."""
    _store(control + _IS_WAITING, 1)
    fence()
