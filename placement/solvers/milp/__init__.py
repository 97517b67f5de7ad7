"""The exact planner: an integer program, the search beside it, and proofs without an engine."""
