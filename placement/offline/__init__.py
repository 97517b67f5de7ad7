"""What is computed ahead of training: solvers played over a trace, plans, back-tests.

backtest.py  Back-tests of predictors on a recorded trace: how wrong is each, and how does a forecast age?
plans.py     Placement files: one JSON file per plan, written atomically and checked as a whole when read.
records.py   Records, as commands print them: a text table, or JSON with the command, machine and commit that made them.
simulate.py  The policy simulator: solvers run over a trace the way training uses them, and judged by the load of each step.
solve.py     Plans solved offline: one placement for a whole trace, from its mean load, layer by layer or over all layers
             together.
"""
