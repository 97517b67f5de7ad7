"""What is computed ahead of training: solvers played over a trace, plans, back-tests."""
