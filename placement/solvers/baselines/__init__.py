"""Baselines: solvers of other systems, as published, and placements that only exchange owners.

eplb.py         EPLB, DeepSeek's replicate-then-pack balancer (deepseek-ai/EPLB), the public baseline.
flexmoe.py      FlexMoE's scheduler (SIGMOD 2023) as LAER-MoE's artifact ports it: expand and shrink replicas for a few rounds.
hecate.py       Hecate's sparse materialization (arXiv 2502.02581, Algorithm 1).
laer.py         LAER-MoE's planner (arXiv 2602.11686, ASPLOS 2026): replica counts by load, spread over nodes, candidates compared
                by cost.
permutation.py  Placements that only exchange owners: longest processing time first, and SmartMoE's guarded form of it.
moetuner.py     MoETuner's two integer programs (arXiv 2502.06643): balanced clusters of experts per layer, then clusters to
                ranks.
"""
