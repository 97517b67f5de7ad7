"""moesaic.kernels"""
