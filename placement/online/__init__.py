"""Placement during training: forecasts, copies added once the load is known, migration proposals.

calibrate.py  Calibration: further copies once the exact load is known, if they save more than they cost on the critical path.
choose.py     Choosing between solvers for a layer in training: the one whose steps take fewer predicted seconds, planning
              included.
predict.py    Predictors: a forecast of a layer's next load from its past loads.
propose.py    Migration proposals: better owners for the coming steps, computed in a separate process that runs `main`.
"""
