"""Placement offline, on recorded traces: the policy simulator, plans solved ahead, back-tests of predictors.

backtest.py  Back-tests of predictors on a recorded trace: the error of each, by the age of the forecast.
plans.py     Plan files: one JSON file per plan, written atomically and validated when read.
records.py   Records, as commands print them: a text table, or JSON with the command, machine and commit that made them.
setting.py   The setting of the policy simulator and of offline plans, and what both take from a recording as a whole.
setting.py   The setting of the policy simulator and of offline plans, and what both take from a recording as a whole.
simulate.py  The policy simulator: solvers run over a trace as training uses them, evaluated on the load of each step.
solve.py     Plans solved offline: one placement for a whole trace, layer by layer or for all layers jointly.
"""
