"""moesaic.runtime"""
