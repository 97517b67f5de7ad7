"""What compiled CPU routines share: BLAS, memory as addresses, operands of fp32 tensors, torch's threads."""
