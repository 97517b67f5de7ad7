"""Solvers of other systems, as published, and placements that only exchange owners."""
