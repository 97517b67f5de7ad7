"""Wrapping a model: `shard_experts`, and the handle that it returns.

dense.py              The dense rest of a model: FSDP2 on its repeated blocks and on the whole, or kept apart from what the user
                      wraps it in.
fingerprint.py        Fingerprints of tensors and texts: 64 bits that show whether two ranks hold the same, to the last bit.
optimizer_numbers.py  The numbers of an optimizer, parameter by parameter, in words: what it updates with, and how often it did.
forwards.py           All ranks compare their places where a model's forward begins, and where its backward does; absent ranks are
                      named.
migration_policy.py   When experts change their owner: observe, ask a solver in the background, move if it pays.
profile.py            A profile of training steps as one Chrome trace: what this rank computed, and under what its communication
                      travelled.
prefetch.py           When gathers are launched: early enough that the copies travel under other work.
drift.py              The drift guard: what ranks must hold alike is compared bit by bit, every so many steps.
handle.py             The handle of a wrapped model: what the user's loop calls, and what it may ask.
shard.py              Wrapping a model: its experts move into banks, the dense rest is sharded by FSDP2, a handle comes back.
"""
