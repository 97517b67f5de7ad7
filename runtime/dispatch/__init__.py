"""Dispatch: the routes of tokens to the ranks that compute them, and the round trip along them.

layouts.py      Index arithmetic of dispatch: consecutive pieces, their regrouping, and bags of rows to sum.
handle.py       The routes of one forward's tokens, over one hop or two, and how tokens and results travel along them.
assignments.py  The assignments of one rank by destination, those that it computes, and the exchange of dispatch metadata that
                describes them.
exchange.py     The round trip of one forward's tokens, or of their gradients in its backward: out to their experts and back.
by_node.py      The route by node: a token crosses to each other node once, and its result comes back once, summed on that node.
direct.py       The direct route: every token goes straight to the ranks that compute it.
"""
