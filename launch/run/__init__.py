"""The parts of a training run: its processes, data and model, and what it writes.

data.py            Byte-level text: documents joined into one memory-mapped file, cut into windows, distributed over the ranks.
replay.py          Replay of a routing trace in training: the routers reproduce the loads of the trace, step by step.
model.py           The demo language model: a small decoder-only transformer over bytes with Mixture-of-Experts layers.
rendezvous.py      The rendezvous: a key-value store that all ranks share, ready once every rank has joined within a time limit.
warm.py            Compilation ahead of use: the routines of one run before its first step, or all (`moesaic doctor --warm`).
process.py         One process of a run: rank, device, process group, agreement between ranks, and stop signals.
checkpoint.py      Checkpoints by torch.distributed.checkpoint, with experts under logical names: any world size loads them.
failure_report.py  Failure report: which collective failed, after which stage, and the status of every other rank.
records.py         What the training program has beside the records of `Handle.record`: its folder, configuration and progress
                   bar.
inputs.py          The inputs of a run: text, progress of a checkpoint, placement plan, machine and replayed trace, the same on
                   every rank.
"""
