"""`moesaic doctor`: what works on this machine, and whether a model computes on several ranks what it computes on one.

children.py     Child processes of a command: started and ended together, each with its exit status and the last line of its
                errors.
target.py       The model that a user names for `moesaic doctor`, a callable or a Hugging Face configuration, and its inputs.
self_test.py    Tests of each transport between two processes of this machine, for `moesaic doctor`.
observe.py      Observation of a model, on one rank as the reference, and on several: outputs, gradients, global norm, router
                losses, counts.
model_check.py  Check of a user's model on several ranks against one rank, for `moesaic doctor --model`.
command.py      `moesaic doctor`: what is installed, what hardware is here, which transports work, and which one a run would take.
"""
