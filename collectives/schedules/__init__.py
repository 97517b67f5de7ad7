"""Pure functions from a placement and a topology to a schedule, one kind per file.

chunks.py           The number of chunks: small chunks fill a pipeline quickly, but each one costs a latency.
direct.py           Direct: the owner sends every copy itself.
element_sharded.py  Element-sharded: every expert is split over the ranks that need it, which then exchange the pieces.
hierarchical.py     Hierarchical: an expert is sent to each node once and distributed inside it from there (after Janus, SIGCOMM
                    2023).
relay.py            Relay: ranks forward the chunks they receive, so that the owner of hot experts sends each of them exactly
                    once.
choose.py           The choice of a schedule, by predicted time.
"""
