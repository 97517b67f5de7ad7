"""Solvers: from a `Problem`, the layer's copies and owners as a `Solution`.

random_numba.py         Random integers for compiled searches, identical on every machine.
score_numba.py          Compiled scoring of copies: the exact split over them, and the counts from which its cost is computed.
engines.py              The solvers of integer programs that PuLP writes down.
bounds.py               A lower bound on a layer's seconds that includes the links: proven by counting, without an integer
                        program.
exhaustive.py           Exhaustive search for tiny layers: every placement is priced; the oracle of the tests.
static.py               Static expert parallelism: the placement without copies.
exchange_numba.py       Compiled tabu search over the owners of one layer, without copies.
anneal_owners_numba.py  Simulated annealing over owners, of one layer or of many jointly, without copies.
balance_numba.py        Compiled routines of the balance planner.
exchange_numba.py       Compiled tabu search over the owners of one layer, without copies.
anneal_copies_numba.py  Simulated annealing over copies and owners, priced under the exact split: the exact planner's incumbents.
hedge_numba.py          Compiled pricing of plans for several loads.
quota_numba.py          Compiled routines of the quota planner: copies for balance, further copies that save dispatch bytes, the
                        cheapest plan.
baselines/              Baselines: solvers of other systems, as published, and placements that only exchange owners.
exchange.py             Owners of layers by exchanges of experts, without copies: a tabu search of each layer (exchange_numba.py).
balance.py              The balance planner: fewest rows on the busiest rank, then few copies at any cost, robust to forecast
                        errors.
exchange.py             Owners of layers by exchanges of experts, without copies: a tabu search of each layer (exchange_numba.py).
quota.py                The quota planner, for every step: a threshold search with few copies, priced in seconds.
hedge.py                Plans that withstand several loads: of several solvers' copies, and of copies for all loads, those of the
                        fewest mean seconds.
joint.py                Owners of all layers together: any number of a layer's experts per rank, the same rows per rank over all
                        layers.
quota_reference.py      The quota planner in plain Python: the specification of its compiled routines, and the oracle of their
                        test.
milp/                   The exact planner: a mixed-integer program, a search that runs beside it, and proofs without an engine.
registry.py             The registry of solvers, by name.
"""
