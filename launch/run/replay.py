"""Replay of a routing trace in training: the routers reproduce the loads of the trace, step by step.

Shape letters: S steps, L layers, R ranks, E experts, T tokens of a rank in one step, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...placement import Trace, TraceMeta
from ...runtime import MoELayer


def open_replay(path: str | Path, meta: TraceMeta, *, num_tokens: int, num_steps: int) -> Trace:
    """The trace at `path`, for a run of `num_steps` steps with `num_tokens` tokens per rank.

    Raises:
        ValueError: the file is no trace, or the trace has another shape, other token counts, or fewer steps.
    """
    where = f"train.replay {path}"
    try:
        trace = Trace(Path(path).expanduser())
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"train.replay: {error}") from None
    for name, option in (
        ("num_layers", "model.num_layers"),
        ("num_experts", "model.num_experts"),
        ("top_k", "model.top_k"),
        ("num_ranks", "the number of ranks"),
    ):
        theirs, ours = getattr(trace.meta, name), getattr(meta, name)
        if theirs != ours:
            raise ValueError(f"{where} has {name} {theirs}, this run {ours}; set {option} to {theirs}, or take another trace")
    if trace.num_steps < num_steps:
        raise ValueError(f"{where} has {trace.num_steps} steps, this run {num_steps}; set train.steps to at most as many")
    if trace.meta.dropped:
        raise ValueError(f"{where} lacks assignments that were dropped; every token chooses top-k experts, so take another trace")
    for step, loads_LRE in enumerate(islice(trace.steps(), num_steps)):
        tokens_R = loads_LRE[0].sum(axis=1) // meta.top_k
        if (tokens_R != num_tokens).any():
            rank = int((tokens_R != num_tokens).argmax())
            raise ValueError(
                f"{where} has {tokens_R[rank]} tokens on rank {rank} in step {step}, this run {num_tokens}; set train.batch_size "
                f"and data.seq_len so that they multiply to {tokens_R[rank] * meta.num_ranks}, or take another trace"
            )
        if loads_LRE.max(initial=0) > num_tokens:
            raise ValueError(
                f"{where} has an expert that {loads_LRE.max()} of {num_tokens} tokens of a rank chose in step {step}; "
                "a token chooses different experts, so take another trace"
            )
    return trace


def ids_of(counts_E: np.ndarray, top_k: int, *, seed: int) -> Tensor:
    """A routing with the given load: int64 [T, K], K different experts per token, expert e `counts_E[e]` times.

    The assignments, sorted by expert, fill the K columns one after the other: no expert has more than T of them, so no token gets
    an expert twice. Then the tokens are shuffled.

    Example: counts (2, 1, 1) and K = 2 fill columns (0, 0) and (1, 2), so the tokens choose {0, 1} and {0, 2}.
    """
    num_tokens = int(counts_E.sum()) // top_k
    assert num_tokens * top_k == counts_E.sum() and counts_E.max(initial=0) <= num_tokens, counts_E
    columns_KT = np.repeat(np.arange(counts_E.size), counts_E).reshape(top_k, num_tokens)
    order_T = np.random.default_rng(seed).permutation(num_tokens)
    return torch.from_numpy(np.ascontiguousarray(columns_KT.T[order_T]))


class Replay:
    """Replays one rank's loads of a trace in the routers of the given layers, in training.

    The router computes gate weights, and thus gradients, for the experts of the trace. Micro-batches take consecutive tokens of a
    step. Evaluation, and recomputation under activation checkpointing, are unchanged.

    Args:
        trace: see `open_replay`.
        layers: the MoE layers, as many as the trace has, in order.
        rank: the rank whose loads are replayed.
        first_step: steps of the trace to skip, in a resumed run.
    """

    def __init__(self, trace: Trace, layers: Sequence[MoELayer], rank: int, *, first_step: int = 0):
        self._steps: Iterator[np.ndarray] = islice(trace.steps(), first_step, None)
        self._step = first_step
        self._rank = rank
        self._top_k = trace.meta.top_k
        self._layers = list(layers)
        assert len(self._layers) == trace.meta.num_layers
        self._ids: list[Tensor] = []
        self._num_used = [0] * len(self._layers)
        for index, layer in enumerate(self._layers):
            layer.router.register_forward_pre_hook(self._hook(index))

    def begin_step(self) -> None:
        """Advance to the next step of the trace."""
        loads_LRE = next(self._steps)
        self._ids = [
            ids_of(load_RE[self._rank], self._top_k, seed=self._step * len(self._layers) + layer)
            for layer, load_RE in enumerate(loads_LRE)
        ]
        self._num_used = [0] * len(self._layers)
        self._step += 1

    def _hook(self, index: int) -> Any:
        def before(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            is_decided = len(args) > 1 and args[1] is not None
            if is_decided or not router.training:
                return None
            x_TD, start = args[0], self._num_used[index]
            ids_TK = self._ids[index][start : start + x_TD.shape[0]]
            assert len(ids_TK) == x_TD.shape[0], "more tokens than the trace has in this step"
            self._num_used[index] = start + x_TD.shape[0]
            return x_TD, ids_TK.to(x_TD.device)

        return before
