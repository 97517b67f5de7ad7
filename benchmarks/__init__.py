"""Benchmarks: each case is checked for correctness first, and reported as ratios within one run.

records.py              Output of benchmarks: flat records as a table or as JSON, with the machine and the commit; intervals of
                        medians.
network.py              A small cluster on one machine: nodes are network namespaces, joined by links of a given rate.
ranks.py                A function called by every rank of a benchmark, each rank a process of its own; its results come back as
                        files.
routed_tokens.py        The op `token_rows` of `moesaic bench collectives`: dispatch and combine of routed tokens, by each route.
cpu_share.py            Processes that each get a fixed share of a core, whatever else runs: slower machines, emulated on one.
kernel_cases.py         The cases of `moesaic bench kernels`, and those of matrix products: every op at every shape, beside
                        torch's own operations.
placement_trace.py      Placement on recorded tokens: gap of the exact solver by layer, and hops between layers under several
                        owner maps.
step.py                 One MoE layer's training step on R processes of one machine, by placement policy.
overlap.py              Exposed communication with overlap and without, between nodes whose links have a given rate.
collectives_rank.py     What `moesaic bench collectives` measures, and one rank of it: builds every variant, checks each, and
                        times them in turn.
kernel_memory_cases.py  The memory-bound cases of `moesaic bench kernels`, beside a copy of as many bytes, and the router's, in
                        microseconds.
placement.py            Time of planner and split by experts and ranks, gap of the exact solver by time, and gap of all layers'
                        owners together.
scaling_model.py        One MoE layer's training step on a simulated machine: placed by the previous load, priced on the current
                        one.
collectives.py          Collectives between processes of one machine, over transports and schedules: `moesaic bench collectives`.
kernels.py              Every kernel against torch and against this machine's own ceilings, measured interleaved in one run.
scaling.py              Throughput of one MoE layer's training step across node counts: on real nodes, on emulated ones, or
                        predicted.
cli.py                  `moesaic bench`: one command per benchmark.
"""
