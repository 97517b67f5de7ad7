"""Traces: recorded and generated expert loads, on disk and as streams.

dealing.py    How assignments that were counted without ranks are dealt to ranks, and shares turned into whole assignments.
npz.py        Files of plain arrays (`.npz`, `.npy`): written atomically, read without pickle, in blocks, and only what headers
              account for.
workloads.py  The workloads of a public imbalance benchmark, W0 to W7: which experts the tokens of a rank choose in a step.
dumps.py      Dumps of serving systems opened as named arrays: `.npz`, `.npy`, and the `.pt` files of SGLang's expert distribution
              recorder.
format.py     Routing traces: recorded expert loads in one `.npz` file, without pickle, written atomically and read as a stream.
synth.py      Synthetic traces: the workloads of workloads.py, or expert popularity over time, step by step in the memory of one
              step.
tokens.py     Recordings of single tokens: ids of their experts, or bool routing maps, cut into steps and split over ranks in
              blocks.
counts.py     Recordings of loads: counts or shares by layer and expert, of one step for each leading index, with or without
              source ranks.
foreign.py    Recordings of other systems: which array of a file is meant, what it holds, and in which order its dims are.
sources.py    Where loads come from: traces at any number of ranks, and foreign recordings turned into loads; all read as a
              stream.
"""
