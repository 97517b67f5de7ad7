"""moesaic.benchmarks"""
