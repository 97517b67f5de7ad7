"""moesaic.collectives"""
