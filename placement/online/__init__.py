"""What training asks for between steps: forecasts, copies added late, owners for the steps to come.

calibrate.py  Calibration: copies added once the exact load is known, where they save more than they cost on the critical path.
predict.py    Predictors: the next load of a layer from the loads it has seen.
propose.py    Owners for the steps to come, proposed in a process of its own, which calls `main`.
"""
