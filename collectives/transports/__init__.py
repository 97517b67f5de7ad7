"""Transports: how bytes move between ranks, one kind per file.

parts.py         What the messages of an exchange move, and the words of errors for how far it came.
hierarchical.py  Two transports as one: messages to ranks of the same node travel inside it, all others between nodes.
node.py          Which ranks share a node: found from what the kernel says of each process, not from host names, which containers
                 copy.
local.py         The transport of a world of one rank: nothing ever travels.
shm_memory.py    Memory that the ranks of one host share: anonymous files, mapped where they are needed.
c10d.py          The transport over torch.distributed: Gloo for CPU tensors, NCCL for CUDA tensors.
mpi.py           The transport over MPI, through mpi4py: every rank of one `mpirun` (or `srun --mpi=pmix`), CPU tensors.
shm_control.py   Control segments: what each rank of one node publishes to the others, and the compiled loops that write and read
                 it.
shm_mailbox.py   How the ranks of one node find each other's memory, sleep until something happens there, and detect ranks that
                 are gone.
shm.py           The transport between ranks of one node: every receiver copies straight out of the sender's memory, once.
choose.py        Which transport a group uses, by one rule, and making it by name.
"""
