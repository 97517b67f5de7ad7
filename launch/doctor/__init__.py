"""`moesaic doctor`: what works on this machine, and whether a model computes on several ranks what it computes on one.

children.py     Processes that a command starts on this machine: run together, ended together, and what the first that failed said
                last.
target.py       The model that a user names, for moesaic doctor: a callable or a Hugging Face configuration, and what goes into
                it.
self_test.py    Each transport tried between two processes of this machine, for `moesaic doctor`.
observe.py      What a model computes: outputs, gradients, global norm, router losses, expert counts; on one rank, and what
                several follow.
model_check.py  A user's model on several ranks against the same model on one, for `moesaic doctor --model`.
command.py      `moesaic doctor`: what is installed, what hardware is here, which transports work, and which one a run would take.
"""
