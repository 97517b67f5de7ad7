"""moesaic: load-adaptive Mixture-of-Experts training."""
