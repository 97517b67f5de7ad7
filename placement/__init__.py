"""moesaic.placement"""
