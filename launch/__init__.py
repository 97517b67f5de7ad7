"""Process start-up, the training entry point, and the `moesaic` command line.

config.py     The whole configuration of a training run: nested frozen dataclasses, read from TOML and `--set section.key=value`.
launcher.py   Rank, world size, local rank and local world size of a process, from the environment variables of its launcher.
measure.py    Measuring a machine for `moesaic calibrate`: links, expert products, copies and gathers, on all ranks at once.
output.py     Output of commands: flat records as a table or as JSON, and a progress bar.
entry.py      The outermost layer of every command: wrong use becomes one line and exit status 2, never a traceback.
offline/      The commands on recorded routing, which need no ranks: `moesaic place`, `moesaic trace` and `moesaic report`.
cli.py        The `moesaic` command: a table of commands, each imported only when it runs.
run/          The parts of a training run: its processes, data and model, and what it writes.
calibrate.py  `moesaic calibrate`: measure this machine, or under a launcher this cluster, and write its machine file.
train.py      Train the demo language model: the program of `moesaic train` and of `python -m moesaic.launch.train`.
doctor/       `moesaic doctor`: what works on this machine, and whether a model computes on several ranks what it computes on one.
"""
