"""One forward of one layer and its backward.

carried.py        Copies that stay in their slots between the micro-batches of a step: weights that did not change are not
                  gathered again.
experts.py        The expert stage: every local expert's SwiGLU over its group of rows, owned experts and copies alike.
layer_pass.py     One forward of one layer, and the backward that belongs to it.
layer_runtime.py  What one MoE layer has of the runtime: its place in the bank, its planner, its passes and its counters.
materialize.py    Materialize: copies of experts fill slots in forward; their gradients flow back to the owners in backward.
metrics.py        What a step looked like, over all layers and layer by layer: load balance with and without copies, copies,
                  bytes, planning.
planning.py       Planning: a placement from the predicted load, early; the token split from the exact load, after the router.
reduces.py        Reduces in flight: launched in their layer's backward, waited for as late as its buffers and its gradient rows
                  allow.
rematerialize.py  Re-materialize: copies that were released after forward are gathered again for backward, from slots that layers
                  share.
token_rows.py     Token rows in the autograd graph: dispatch and combine, each the other's backward; and the work that they travel
                  under.
"""
