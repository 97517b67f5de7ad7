"""Placement during training: forecasts, copies added once the load is known, migration proposals.

calibrate.py  Calibration: further copies once the exact load is known, if they save more than they cost on the critical path.
predict.py    Predictors: a forecast of a layer's next load from its past loads.
propose.py    Migration proposals: better owners for the coming steps, computed in a separate process that runs `main`.
"""
