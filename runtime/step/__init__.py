"""One forward of one layer and its backward.

autograd.py       The three nodes of a pass in the autograd graph: Dispatch, Experts, Combine.
planning.py       Planning: a placement from the predicted load, early; the token split from the exact load, after the router.
replay.py         Recomputation by activation checkpointing: which pass a repeated forward repeats.
work_ahead.py     The seconds of other work ahead of a layer, under which its gathers travel: observed in its first forwards,
                  agreed on once.
metrics.py        What a step looked like, over all layers and layer by layer: load balance with and without copies, copies,
                  bytes, planning.
contexts.py       What passes read: of the model, and of the layer.
layer_pass.py     One forward of one layer, and the backward that belongs to it.
layer_runtime.py  What lasts of one MoE layer from pass to pass: its planner, its counters, and the passes under way.
"""
