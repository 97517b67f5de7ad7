"""Process start-up, the training entry point, and the `moesaic` command line.

config.py      the whole configuration, from TOML and --set
launcher.py    what torchrun, mpirun or srun tell a process
meeting.py     how ranks meet, and who never came
process.py     one process: rank, device, group, memory, signals
data.py        bytes of text, windows, batches by position
model.py       the demo transformer
train.py       the loop
checkpoint.py  save and resume, any world size
records.py     the run folder: metrics, trace, progress bar, summary
doctor.py      what works on this machine
self_test.py   each transport, tried between two processes
place.py       placements offline: solve, compare, replay, show
trace.py       traces: info, convert, synth, backtest
trace_options.py, output.py, picture.py   what those share
cli.py         the table of commands
entry.py       errors and exit status at the outermost edge
"""
