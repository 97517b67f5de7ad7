"""Traces: recorded and generated expert loads, on disk and as streams.

npz.py      Archives of plain arrays (`.npz`): written atomically, read without pickle, in blocks, and only what their headers
            account for.
format.py   Routing traces: recorded expert loads in one `.npz` file, without pickle, written atomically and read as a stream.
sources.py  Where loads come from: traces at any number of ranks, and foreign recordings of tokens, counts or shares turned into
            loads.
synth.py    Synthetic traces: expert popularity over time, sampled step by step in the memory of one step.
"""
