"""Dispatch: where token rows go, and how they travel to their experts and back.

expert_order.py  In which order ranks compute their experts, so that token rows travel under experts that need none of them.
handle.py        How token rows travel once it is known where they go: out to the ranks that compute them and home again, in one
                 part or in two.
direct.py        Where token rows go: to the ranks that compute them, and back.
by_node.py       Dispatch over nodes of several ranks: a token row crosses to each node once, and comes back once, summed on that
                 node.
"""
