"""Pure functions from a placement and a topology to a schedule, one kind a file.

chunks.py           How many chunks: small ones fill a pipeline quickly, and each one costs a latency.
direct.py           Direct: every copy comes straight from the expert's owner.
element_sharded.py  Element-sharded: every expert is cut over the ranks that need it, and they exchange the pieces.
hierarchical.py     Hierarchical: an expert crosses to each node once and spreads inside it from there (Janus, SIGCOMM 2023, for
                    the idea).
relay.py            Relay: a rank that received a chunk forwards it, so that a hot owner sends each of its experts exactly once.
choose.py           The choice of a schedule, by predicted time.
"""
