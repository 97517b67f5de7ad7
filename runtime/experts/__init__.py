"""Experts: the bank of those that this rank owns, copies of others, gradients, and migration between owners.

expert.py           One expert: its shape, its tensors, and the module that holds its parameters on the rank that owns it.
expert_grad.py      Gradients of experts: whole on the rank that owns the expert, so a norm or check over all gradients is a
                    collective.
optimizer_watch.py  Optimizers of a bank's experts: their steps change the weights, and what they cannot do with experts is
                    refused.
memory.py           How much memory slots take: the peak, predicted, and what fits into a budget.
slots.py            Slots: expert-sized buffers that the layers of a bank share.
owned_grads.py      The gradients of a bank's experts: memory that kernels and the sparse reduce write, and `.grad` of the
                    parameters points to.
bank.py             The bank: the memory of the experts that this rank owns, a row each, under the parameters that the rest of a
                    program sees.
grads.py            Gradients of one layer's experts in one backward: where they are written, and the sparse reduce-scatter to the
                    owners.
migrate.py          Migration: experts change their owner between steps; weights, gradients and optimizer state go along.
replicas.py         Copies of other ranks' experts: gathered into slots for a forward, released, and gathered again for its
                    backward.
"""
