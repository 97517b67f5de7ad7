"""Benchmarks: cases, a correctness gate first, rows of numbers as ratios within one run.

rows.py   the machine, the commit, tables and JSON
cli.py    moesaic bench ...
step.py   one MoE layer: forward, backward, optimizer, by placement policy and skew
"""
