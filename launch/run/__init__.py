"""The parts of a training run: its processes, data and model, and what it writes.

data.py            Byte-level text: documents joined into one memory-mapped file, cut into windows, distributed over the ranks.
replay.py          Replay of a routing trace in training: the routers of a model choose experts so that their loads are the
                   trace's, step by step.
tensorboard.py     Metrics for TensorBoard, where its package is installed.
model.py           The demo language model: a small decoder-only transformer over bytes whose feed-forward is a Mixture of
                   Experts.
rendezvous.py      The rendezvous: a key-value store that all ranks share, complete once every rank has joined within a time
                   limit.
warm.py            Compilation ahead of use: the routines of a run before its first step, or all routines, for `moesaic doctor
                   --warm` and `make`.
process.py         One process of a run: its rank, its device, its process group, agreement with the other ranks, and signals that
                   stop it.
checkpoint.py      Checkpoints by torch.distributed.checkpoint: experts under logical names, so any world size loads what any
                   other wrote.
failure_report.py  Failure report: which collective failed, after which stage, and the status of every other rank.
records.py         The records of a run: its folder, metrics, routing trace, progress bar and summary.
inputs.py          The inputs of a run, read before its first step: text, checkpoint progress, placement plan and replayed trace.
"""
