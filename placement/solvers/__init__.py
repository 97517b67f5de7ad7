"""Solvers: which copies a layer makes and who owns its experts, from a `Problem` to a `Solution`.

random_numba.py         Random integers for compiled searches, the same on every machine.
score_numba.py          Compiled scoring of copies: the exact split over them, and the counts that its cost is priced from.
engines.py              The solvers of integer programs, through PuLP.
bounds.py               A lower bound on a layer's seconds that counts the links: proven by counting, without an engine.
exhaustive.py           The oracle for tiny layers: price every placement.
static.py               Static expert parallelism: the placement without copies.
anneal_owners_numba.py  Simulated annealing over owners, of one layer or of many together, without copies.
balance_numba.py        Compiled routines of the balance planner.
anneal_copies_numba.py  Simulated annealing over copies and owners, priced by cost.py's model under the exact split: the exact
                        planner's incumbents.
quota_numba.py          Compiled routines of the quota planner: copies for balance, further copies that save dispatch bytes, the
                        cheapest plan.
baselines/              Solvers of other systems, as published, and placements that only exchange owners.
balance.py              The balance planner: fewest rows on the busiest rank first, then few copies, whatever they cost; and the
                        forecast may be wrong.
quota.py                The online planner: an exact-load threshold search with few copies, priced in seconds.
joint.py                Owners of all layers together: any number of a layer's experts per rank, the same rows per rank over all
                        layers.
quota_reference.py      The quota planner in plain Python: what its compiled routines mean, and the oracle of their test.
milp/                   The exact planner: an integer program, the search beside it, and proofs without an engine.
registry.py             The solvers by name.
"""
