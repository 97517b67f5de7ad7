"""Routing: which experts each token goes to, with which weights, and how many tokens an expert takes.

capacity.py  Capacity: the most assignments that an expert takes from one rank's micro-batch; what is above is dropped.
router.py    Routers: which experts a token goes to, with which weight, and the losses that keep the choice healthy.
"""
