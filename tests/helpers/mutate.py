"""Damaged inputs for the offline commands: every one must end in a right answer or in status 2 and one line.

`python -m tests.helpers.mutate 10000` runs that many and prints a summary.
"""

import collections
import contextlib
import copy
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.launch.cli import cli
from moesaic.launch.entry import run_command
from moesaic.placement.traces.format import TraceMeta, write_trace

LIMIT_S = 20
META = TraceMeta(num_layers=2, num_experts=8, top_k=2, num_ranks=4, dim=16, ffn_dim=32, source="a test")
VALUES = (
    float("nan"),
    float("inf"),
    -1,
    -(10**40),
    0,
    0.5,
    10**6,
    10**19,
    1e308,
    1e-300,
    10**4000,
    True,
    None,
    "8",
    [],
    {},
    [[0]],
)


@dataclass(frozen=True)
class Ended:
    """How a command ended on a damaged file."""

    kind: str
    status: int
    stderr: str


def run_quietly(*args: str) -> Ended:
    """Run a command in this process; what is not an answer or a clear line is raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_command(cli, list(args))
    return Ended(" ".join(args[:2]), status, err.getvalue())


class Mutator:
    """Good files in a folder, and ways to damage them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        rng = np.random.default_rng(seed)
        self.loads = rng.multinomial(40, rng.dirichlet(np.ones(8)), size=(3, 2, 4))
        self.ids = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(24)]).astype(np.int8)
        self.good = folder / "good.npz"
        write_trace(self.good, META, self.loads, topk_ids_TLK=self.ids, pair_counts_LEE=np.ones((1, 8, 8), dtype=int))
        solve = ["place", "solve", str(self.good), "--solver", "quota", "--slots", "1", "-o", str(folder / "plan.json")]
        assert run_quietly(*solve).status == 0
        other = TraceMeta(num_layers=1, num_experts=6, top_k=1, num_ranks=2, dim=16, ffn_dim=32)
        write_trace(folder / "other.npz", other, np.full((2, 1, 2, 6), 3))
        assert run_quietly("place", "solve", str(folder / "other.npz"), "-o", str(folder / "other.json")).status == 0
        self.plan = json.loads((folder / "plan.json").read_text())
        self.bad_npz, self.bad_json = folder / "bad.npz", folder / "bad.json"

    def run_one(self) -> Ended:
        """Damage one file in some way, and run a command on it."""
        kind = self.rng.choice(
            (self._trace_bytes, self._trace_arrays, self._tokens, self._plan_text, self._plan_values, self._topology)
        )
        return run_quietly(*kind())

    def _flip(self, data: bytes) -> bytes:
        """Cut the end off, or flip a few bits."""
        changed = bytearray(data)
        if self.rng.random() < 0.2:
            del changed[self.rng.randrange(len(changed)) :]
        for _ in range(self.rng.randint(1, 4) if changed else 0):
            changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
        return bytes(changed)

    def _trace_command(self) -> list[str]:
        path = str(self.bad_npz)
        return self.rng.choice(
            (
                ["trace", "info", path],
                ["trace", "backtest", path],
                ["trace", "convert", path, str(self.folder / "out.npz"), "--ranks", "2"],
                ["place", "compare", path, "--solver", "quota", "--solver", "hecate"],
                ["place", "replay", path, "--plan", str(self.folder / "plan.json")],
                ["place", "solve", path, "--solver", "static", "-o", str(self.folder / "out.json")],
            )
        )

    def _trace_bytes(self) -> list[str]:
        self.bad_npz.write_bytes(self._flip(self.good.read_bytes()))
        return self._trace_command()

    def _trace_arrays(self) -> list[str]:
        """A whole archive whose content cannot be right, or whose headers lie."""
        meta = {"schema": "moesaic-trace/1", "steps": 3, **META.__dict__}
        loads: Any = self.loads.astype(np.int32)
        change = self.rng.randrange(7)
        if change == 0:
            meta[self.rng.choice(sorted(meta))] = self.rng.choice(VALUES)
        elif change == 1:
            loads = loads.astype(self.rng.choice((np.float64, np.int8, np.int64, np.uint16, np.complex64, np.str_)))
        elif change == 2:
            loads = loads.astype(np.int64)
            loads.flat[self.rng.randrange(loads.size)] = self.rng.choice((-1, 2**31, 2**62, -(2**63), 7))
        elif change == 3:
            loads = loads[tuple(slice(0, self.rng.randint(0, size)) for size in loads.shape)]
        elif change == 4:
            loads = np.where(loads > 3, np.nan, loads)
        elif change == 5:
            loads = np.zeros((3, 2, 4, 0), dtype=np.int32) if self.rng.random() < 0.5 else np.array([{}], dtype=object)
        np.savez(self.bad_npz, meta=np.array(json.dumps(meta)), loads=loads)
        if change == 6:
            self._lie()
        return self._trace_command()

    def _lie(self) -> None:
        """Headers that promise far more than is there, and compressed bombs."""
        shape = (self.rng.choice((10**6, 10**12, 10**30)), 2, 4, 8)
        with zipfile.ZipFile(self.bad_npz, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("meta.npy", "w") as member:
                text = json.dumps({"schema": "moesaic-trace/1", "steps": shape[0], **META.__dict__})
                np.lib.format.write_array(member, np.array(text))
            with archive.open("loads.npy", "w") as member:
                if self.rng.random() < 0.5:
                    np.lib.format.write_array_header_2_0(member, {"descr": "<i4", "fortran_order": False, "shape": shape})
                else:
                    member.write(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(1 << 16))

    def _tokens(self) -> list[str]:
        ids: Any = self.ids.copy()
        if self.rng.random() < 0.5:
            ids.flat[self.rng.randrange(ids.size)] = self.rng.choice((-1, 8, 127))
        else:
            ids = ids.astype(self.rng.choice((np.float16, np.float32, np.int64, np.uint8, np.uint64, np.bool_)))[
                : self.rng.randint(0, 24), :, : self.rng.randint(0, 2)
            ]
        meta = np.array(json.dumps({"n_experts": self.rng.choice((8, 8, *VALUES)), "source": "x"}))
        name = self.rng.choice(("topk_ids", "counts", "shares", "routing_map", "arr_0"))
        np.savez(self.bad_npz, **{name: ids, "meta": meta})
        ranks = self.rng.choice(("1", "4", "7", "2048", "1000000"))
        extra = self.rng.choice(
            (
                *([], ["--experts", "8"], ["--tokens-per-step", "6"], ["--tokens-per-step", "99999999"], ["--top-k", "2"]),
                *(["--top-k", "2", "--shares"], ["--experts", "8", "--none", "127"], ["--top-k", "2", "--axes", "LSE"]),
            )
        )
        return ["trace", "convert", str(self.bad_npz), str(self.folder / "out.npz"), "--ranks", ranks, *extra]

    def _plan_command(self) -> list[str]:
        path = str(self.bad_json)
        return self.rng.choice(
            (
                ["place", "show", path],
                ["place", "replay", str(self.good), "--plan", path],
                ["place", "solve", str(self.good), "--solver", "lpt", "--current", path, "-o", str(self.folder / "out.json")],
            )
        )

    def _plan_text(self) -> list[str]:
        source = self.rng.choice(("plan.json", "plan.json", "other.json"))
        self.bad_json.write_bytes(self._flip((self.folder / source).read_bytes()))
        return self._plan_command()

    def _plan_values(self) -> list[str]:
        plan = copy.deepcopy(self.plan)
        self._damage(plan)
        self.bad_json.write_text(json.dumps(plan))
        return self._plan_command()

    def _topology(self) -> list[str]:
        topology = dict(self.plan["topology"])
        self._damage(topology)
        text = json.dumps(topology)
        self.bad_json.write_bytes(self._flip(text.encode()) if self.rng.random() < 0.3 else text.encode())
        machine = self.rng.choice((str(self.bad_json), str(self.bad_json), "65536x65536", "0x4", "2048x2048", "1x256", "2x2"))
        solver = self.rng.choice(("quota", "hecate", "laer", "eplb"))
        return ["place", "compare", str(self.good), "--topology", machine, "--solver", solver, "--knows", "exact", "--steps", "1"]

    def _damage(self, tree: Any) -> None:
        """Replace, remove or repeat one thing somewhere in a JSON tree."""
        while True:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            key = self.rng.choice(keys)
            inner = tree[key]
            if not isinstance(inner, dict | list) or not inner or self.rng.random() < 0.2:
                break
            tree = inner
        change = self.rng.randrange(4)
        if change == 0:
            del tree[key]
        elif change == 1 and isinstance(tree, list):
            tree.append(copy.deepcopy(inner))
        else:
            tree[key] = self.rng.choice((*VALUES, *range(9)))


def check(ended: Ended) -> None:
    """Raise AssertionError unless a command ended as it should."""
    assert ended.status in (0, 2), ended
    lines = [line for line in ended.stderr.splitlines() if "are read for one more release" not in line]
    assert len(lines) == (1 if ended.status else 0), ended
    assert len(ended.stderr) < 1000, ended


def run_many(
    count: int, folder: Path, seed: int, on_each: Callable[[Ended], None] = check
) -> collections.Counter[tuple[str, int]]:
    """Run `count` damaged files, each within the time limit, and count how they ended by command and status."""

    def too_long(signum: int, frame: object) -> None:
        raise TimeoutError(f"a command took more than {LIMIT_S} s")

    mutator = Mutator(folder, seed)
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for _ in range(count):
            signal.alarm(LIMIT_S)
            ended = mutator.run_one()
            signal.alarm(0)
            on_each(ended)
            counts[ended.kind, ended.status] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return counts


if __name__ == "__main__":
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        found = run_many(int(sys.argv[1]), Path(name), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for (command, status), count in sorted(found.items()):
        print(f"{command:16} status {status}: {count}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{sum(found.values())} damaged files in {time.perf_counter() - start:.0f} s, peak memory {peak:.0f} MiB with libraries"
    )
