"""Benchmarks: cases, a correctness gate first, rows of numbers as ratios within one run.

records.py           What every benchmark prints: records of flat objects, as a table or as JSON, with the machine and the commit.
network.py           A small cluster on one machine: nodes are network namespaces, joined by links of a given rate.
token_rows.py        The op `token_rows` of `moesaic bench collectives`: tokens to the ranks that compute them and back, by each
                     route.
cpu_share.py         Processes that each get a stated share of a core, whoever else runs: slower machines, emulated on one.
kernel_cases.py      What `moesaic bench kernels` measures, and its products: each at each shape, torch's ways to the same, and
                     the dense product.
placement_trace.py   Placement on recorded tokens: the exact solver's gap layer by layer, and what layer-to-layer hops cost other
                     owners.
overlap.py           Exposed communication with overlap and without, between nodes whose links have a given rate.
step.py              One MoE layer's training step on R processes of one machine, by placement policy.
collectives.py       Collectives between processes of one machine, over transports and schedules: `moesaic bench collectives`.
kernel_row_cases.py  The cases of `moesaic bench kernels` that memory bounds, beside a copy of as many bytes, and the router's in
                     microseconds.
placement.py         Planner and split time by experts and ranks, the gap of the exact solver against time, and of all layers'
                     owners together.
scaling_model.py     One MoE layer's training step on a machine that is not there: placed from the load before, priced on the load
                     that came.
collectives_rank.py  One rank of `moesaic bench collectives`: builds every way to the same collective, checks it, times all of
                     them in turn.
kernels.py           Every kernel against torch and against this machine's own ceilings, measured interleaved in one run.
scaling.py           Throughput of one MoE layer's training step across node counts: on real nodes, on emulated ones, or
                     predicted.
cli.py               `moesaic bench`: one command a benchmark.
"""
