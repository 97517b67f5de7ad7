"""Process start-up, the training entry point, and the `moesaic` command line.

config.py         The whole configuration of a training run: nested frozen dataclasses, read from TOML and `--set
                  section.key=value`.
children.py       Processes that a command starts on this machine: run together, ended together, and what the first that failed
                  said last.
output.py         What the offline commands print: rows of flat objects, as a table or as JSON with where they come from.
warm.py           Compiling ahead: the routines of a run before its first step, or all of them, for `moesaic doctor --warm` and
                  `make`.
launcher.py       What a launcher tells a process: its rank, how many there are, and which of them are on its machine.
target.py         The model that a user names, for moesaic doctor: a callable or a Hugging Face configuration, and what goes into
                  it.
picture.py        A comparison as one self-contained HTML page: bars of the balance, and a heat map by layer.
trace_options.py  The options by which every offline command opens a trace.
tensorboard.py    Metrics for TensorBoard, where its package is installed.
replay.py         A recorded routing trace forced through the routers of a model: their loads in training are the trace's, step by
                  step.
data.py           Byte-level text: documents joined into one memory-mapped file, cut into windows, dealt to ranks.
model.py          The demo language model: a small decoder-only transformer over bytes whose feed-forward is a Mixture of Experts.
self_test.py      Each transport tried between two processes of this machine, for `moesaic doctor`.
entry.py          What every command shares at its outermost edge: wrong use becomes one line and exit status 2, never a
                  traceback.
observe.py        What a model computes: outputs, gradients, global norm, router losses, expert counts; on one rank, and what
                  several follow.
place.py          `moesaic place`: solve, compare, replay and show placements on recorded routing.
trace.py          `moesaic trace`: look into, convert, generate and back-test routing traces.
cli.py            The `moesaic` command: a table of commands, each imported only when it runs.
meeting.py        How ranks meet: a key-value store that all of them share, and in it a roll-call with a time limit of its own.
report.py         `moesaic report`: a run or a routing trace as one self-contained HTML page.
process.py        One process of a run: who it is, where it computes, how it meets the others, how it is stopped.
checkpoint.py     Checkpoints by torch.distributed.checkpoint: experts under logical names, so any world size loads what any other
                  wrote.
diagnosis.py      What a rank can say when communication fails: in which collective, after which stage, and what became of the
                  others.
model_check.py    A user's model on several ranks against the same model on one, for `moesaic doctor --model`.
records.py        What a run leaves behind, and what it shows: its folder, metrics, routing trace, progress bar and summary.
doctor.py         `moesaic doctor`: what is installed, what hardware is here, which transports work, and which one a run would
                  take.
train.py          Train the demo language model: `python -m moesaic.launch.train`, `torchrun ...
"""
