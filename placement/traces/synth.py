"""Synthetic traces: the workloads of workloads.py, or expert popularity over time, step by step in the memory of one step.

Shape letters: L layers, R ranks, E experts, K top-k, T tokens per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ..content import check_positive_int, check_seconds
from .format import TraceMeta
from .workloads import WORKLOADS, Workload

# A burst multiplies one expert's popularity for this many steps.
_BURST_FACTOR = 20.0
_BURST_STEPS = 5
_BURST_CHANCE = 0.2


@dataclass(frozen=True)
class SynthSpec:
    """Parameters of a synthetic trace; of a workload (workloads.py), or by a law.

    skew: Zipf exponent. drift: standard deviation of a step of the log-popularities. Workloads have neither.
    """

    meta: TraceMeta
    kind: str
    num_steps: int
    tokens_per_rank: int
    skew: float = 1.2
    drift: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; known: {', '.join(KINDS)}")
        check_positive_int("steps", self.num_steps)
        check_positive_int("tokens per rank", self.tokens_per_rank)
        check_positive_int("seed", self.seed, minimum=0)
        for name in ("skew", "drift"):
            if check_seconds(name, getattr(self, name)) > 100:
                raise ValueError(f"{name} {getattr(self, name)} is above 100; no router is like that")
        if self.tokens_per_rank * self.meta.top_k > np.iinfo(np.int32).max:
            raise ValueError(f"{self.tokens_per_rank} tokens x top-{self.meta.top_k} do not fit int32; lower the tokens per rank")


def _zipf(spec: SynthSpec, rng: np.random.Generator) -> np.ndarray:
    """Return log-popularities [L, E] of a Zipf law, in a different random order in every layer."""
    ranks_E = np.arange(1, spec.meta.num_experts + 1)
    return np.stack([-spec.skew * np.log(rng.permutation(ranks_E)) for _ in range(spec.meta.num_layers)])


def _steady(logits_LE: np.ndarray, spec: SynthSpec, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield logits_LE


def _walk(logits_LE: np.ndarray, spec: SynthSpec, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield logits_LE
        logits_LE = logits_LE + spec.drift * rng.standard_normal(logits_LE.shape)


def _bursts(logits_LE: np.ndarray, spec: SynthSpec, rng: np.random.Generator) -> Iterator[np.ndarray]:
    left_LE = np.zeros(logits_LE.shape, dtype=np.int64)
    while True:
        starts_L = rng.random(logits_LE.shape[0]) < _BURST_CHANCE
        experts_L = rng.integers(0, logits_LE.shape[1], size=(logits_LE.shape[0],))
        left_LE[np.flatnonzero(starts_L), experts_L[starts_L]] = _BURST_STEPS
        yield logits_LE + np.log(_BURST_FACTOR) * (left_LE > 0)
        left_LE = np.maximum(left_LE - 1, 0)


def _one_hot(logits_LE: np.ndarray, spec: SynthSpec, rng: np.random.Generator) -> Iterator[np.ndarray]:
    hot_L = rng.integers(0, logits_LE.shape[1], logits_LE.shape[0])
    hot_LE = np.zeros(logits_LE.shape)
    hot_LE[np.arange(hot_L.size), hot_L] = 50.0
    while True:
        yield hot_LE


def _flat(spec: SynthSpec, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((spec.meta.num_layers, spec.meta.num_experts))


@dataclass(frozen=True)
class _Law:
    start: Callable[[SynthSpec, np.random.Generator], np.ndarray]
    change: Callable[[np.ndarray, SynthSpec, np.random.Generator], Iterator[np.ndarray]]
    meaning: str


_LAWS: Mapping[str, _Law] = MappingProxyType(
    {
        "uniform": _Law(_flat, _steady, "every expert as popular"),
        "zipf": _Law(_zipf, _steady, "a Zipf law that stays"),
        "drifting": _Law(_zipf, _walk, "a Zipf law whose log-popularities walk at random"),
        "bursty": _Law(_zipf, _bursts, "a Zipf law with experts that run hot for a few steps"),
        "one-hot": _Law(_flat, _one_hot, "one expert takes every token, the others share the rest"),
    }
)
KINDS = (*_LAWS, *WORKLOADS)


def _draw(popularity_E: np.ndarray, spec: SynthSpec, rng: np.random.Generator) -> np.ndarray:
    """Sample one layer's loads, int64 [R, E]: T x K assignments per rank, at most T for one expert.

    A token chooses K different experts, so assignments of a multinomial sample above T per expert are moved to the experts below
    it.
    """
    num_ranks, tokens = spec.meta.num_ranks, spec.tokens_per_rank
    load_RE = rng.multinomial(tokens * spec.meta.top_k, popularity_E / popularity_E.sum(), size=num_ranks)
    for rank in range(num_ranks):
        while (surplus := int((load_RE[rank] - tokens).clip(min=0).sum())) > 0:
            load_RE[rank] = load_RE[rank].clip(max=tokens)
            room_E = np.where(load_RE[rank] < tokens, np.maximum(popularity_E, 1e-12), 0.0)
            load_RE[rank] += rng.multinomial(surplus, room_E / room_E.sum())
    return load_RE


def synthesize(spec: SynthSpec) -> Iterator[np.ndarray]:
    """Yield every step's loads, int64 [L, R, E]; deterministic for a given spec."""
    if spec.kind in WORKLOADS:
        meta = spec.meta
        layers = [
            Workload(
                name=spec.kind,
                num_ranks=meta.num_ranks,
                num_experts=meta.num_experts,
                top_k=meta.top_k,
                tokens_per_rank=spec.tokens_per_rank,
                seed=spec.seed,
                layer=layer,
            )
            for layer in range(meta.num_layers)
        ]
        yield from (np.stack([layer.load_RE(step) for layer in layers]) for step in range(spec.num_steps))
        return
    rng = np.random.default_rng(spec.seed)
    law = _LAWS[spec.kind]
    laws = law.change(law.start(spec, rng), spec, rng)
    for _ in range(spec.num_steps):
        logits_LE = next(laws)
        popularity_LE = np.exp(logits_LE - logits_LE.max(axis=1, keepdims=True))
        yield np.stack([_draw(popularity_E, spec, rng) for popularity_E in popularity_LE])
