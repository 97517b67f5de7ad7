"""Wrapping a model: `shard_experts`, and the handle that it returns.

dense.py              The dense rest of a model: FSDP2 on its repeated blocks and on the whole, or kept apart from what the user
                      wraps it in.
fingerprint.py        Fingerprints of tensors and texts: 64 bits that are equal where the contents are, to the last bit.
optimizer_numbers.py  The numbers of an optimizer as text, parameter by parameter: the settings it updates with, and its count of
                      steps.
generate.py           `generate` of a wrapped model of transformers: ranks ask for as many tokens as they like, and all end
                      together.
migration_policy.py   When experts migrate, which is to change their owner: observe, ask a solver in the background, migrate if it
                      pays.
sharded_model.py      A model whose experts are in banks: what has to happen before its weights are read, or after they were
                      written.
prefetch.py           When gathers are launched: early enough that the copies travel under other work.
profile.py            A profile of training steps as one Chrome trace: what this rank computed, and what overlapped its
                      communication.
run_summary.py        A run in a few numbers, added up step by step in constant memory but for one number a step.
tensorboard.py        Metrics for TensorBoard, where its package is installed.
drift.py              The drift guard: state that must be equal on several ranks is compared bit by bit, every so many steps.
forwards.py           All ranks compare their places where a model's forward begins, and where its backward does; absent ranks are
                      named.
model_weights.py      The weights of a sharded model under the names that it has unwrapped: a state dict, and folders of
                      safetensors.
telemetry.py          What the steps of a sharded model were made of: loads, bytes, memory, decisions about owners, profiles.
recorder.py           The records of a run in its folder, from the numbers that a handle has after each step.
handle.py             The handle of a wrapped model: what a training loop calls.
shard.py              Wrapping a model: its experts move into banks, the dense rest is sharded by FSDP2, a handle comes back.
"""
