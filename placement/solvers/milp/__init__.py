"""The exact planner: a mixed-integer program, a search that runs beside it, and proofs without an engine.

chains_numba.py  Compiled routines of chains.py.
model.py         The placement of one layer as a mixed-integer program in PuLP.
priced.py        The token split that the cost model likes best, as an integer program.
chains.py        The best placement whose ranks send and receive at most one copy: found, and proven best, without an integer
                 program.
search.py        What the exact planner starts from and betters: heuristics, annealing from them, and the cheapest split of what
                 they find.
planner.py       The exact planner: searches for the best placement, and a mixed-integer program with a time limit that proves a
                 gap.
"""
