"""Traces: recorded and generated loads, on disk and as a stream.

npz.py      Archives of plain arrays (`.npz`): written atomically, read without pickle, in blocks, and only what their headers
            account for.
format.py   Routing traces: recorded expert loads in one `.npz` file, without pickle, written atomically and read as a stream.
sources.py  Where loads come from: traces at any number of ranks, and foreign recordings of tokens, counts or shares turned into
            loads.
synth.py    Generated traces: popularity laws over time, drawn step by step, so that a trace of any length needs the memory of one
            step.
"""
