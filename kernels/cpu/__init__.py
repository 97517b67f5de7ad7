"""Shared by the compiled CPU routines: BLAS, memory by address, operands of fp32 tensors, torch's threads.

threads.py   Distribution of a compiled routine's rows over torch's own CPU threads.
memory.py    Memory by address, for compiled routines: cached and non-temporal copies, and a fence.
operands.py  Addresses and strides of fp32 tensors in host memory, for compiled routines; each tensor is inspected once.
blas.py      Matrix products for compiled routines, by the BLAS that torch was built with.
"""
