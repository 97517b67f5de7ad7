"""What compiled CPU routines share: BLAS, memory as addresses, operands of fp32 tensors, torch's threads.

threads.py   Rows of a compiled routine shared out among torch's own CPU threads.
memory.py    Memory as addresses, for compiled routines: copies through the caches and past them, and a fence.
operands.py  What compiled routines take of fp32 tensors in host memory: their addresses and strides, each tensor looked at once.
blas.py      Matrix products from compiled routines, by the BLAS that torch was built with.
"""
