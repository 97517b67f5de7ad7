"""Process start-up, the training entry point, and the `moesaic` command line.

config.py    The whole configuration of a training run: nested frozen dataclasses, read from TOML and `--set section.key=value`.
output.py    What the offline commands print: records of flat objects, as a table or as JSON with where they come from.
launcher.py  Rank, world size, local rank and local world size of a process, from the environment variables of its launcher.
offline/     The commands on recorded routing, which need no ranks: `moesaic place`, `moesaic trace` and `moesaic report`.
entry.py     What every command shares at its outermost edge: wrong use becomes one line and exit status 2, never a traceback.
cli.py       The `moesaic` command: a table of commands, each imported only when it runs.
run/         The parts of a training run: its processes, data and model, and what it writes.
doctor/      `moesaic doctor`: what works on this machine, and whether a model computes on several ranks what it computes on one.
train.py     Train the demo language model: `python -m moesaic.launch.train`, `torchrun ...
"""
