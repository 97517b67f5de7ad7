"""Solvers: which copies a layer makes and who owns its experts, from a `Problem` to a `Solution`."""
