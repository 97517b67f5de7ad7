"""Experts: the bank of those that this rank owns, copies of others, gradients, and migration between owners.

expert.py       One expert: its shape, its tensors, and the module that holds its parameters on the rank that owns it.
expert_grad.py  Gradients of experts: whole on the rank that owns the expert, so whatever judges all gradients together must ask
                all ranks.
memory.py       How much memory slots take: the peak, predicted, and what fits into a budget.
slots.py        Slots: expert-sized buffers that the layers of a bank share.
bank.py         The bank: memory and gradients of the experts that this rank owns, each once, under the parameters that everybody
                else sees.
migrate.py      Migration: experts change their owner between steps; weights, gradients and optimizer state go along.
"""
