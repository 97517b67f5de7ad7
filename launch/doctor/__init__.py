"""`moesaic doctor`: what works on this machine, and whether a model computes on several ranks what it computes on one.

children.py       Child processes of a command: started and ended together, with exit status and last error line of each.
machine_check.py  Comparison of this machine with a machine file, for `moesaic doctor --machine`.
target.py         The model that a user names for `moesaic doctor`, a callable or a Hugging Face configuration, and its inputs.
self_test.py      Tests of each transport between two processes of this machine, for `moesaic doctor`.
observe.py        Observation of a model on one rank or several: outputs, gradients, global norm, router losses, counts.
family_models.py  Small random models of the MoE families of the installed transformers, for `moesaic doctor --families`.
model_check.py    Check of a user's model on several ranks against one rank, for `moesaic doctor --model`.
families.py       Check of every MoE family of the installed transformers, for `moesaic doctor --families`.
command.py        `moesaic doctor`: installed packages, devices, transports that work, and the one that a run would use.
"""
