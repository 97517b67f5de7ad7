"""Placement offline, on recorded traces: the policy simulator, plans solved ahead, back-tests of predictors.

backtest.py  Back-tests of predictors on a recorded trace: the error of each, by the age of the forecast.
plans.py     Plan files: one JSON file per plan, written atomically and validated when read.
records.py   Records, as commands print them: a text table, or JSON with the command, machine and commit that made them.
simulate.py  The policy simulator: solvers run over a trace as training uses them, evaluated on the load of each step.
solve.py     Plans solved offline: one placement for a whole trace, from its mean load, layer by layer or for all layers jointly.
"""
