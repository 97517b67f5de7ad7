"""The commands on recorded routing, which need no ranks: `moesaic place`, `moesaic trace` and `moesaic report`.

page.py           One self-contained HTML page of sections.
trace_options.py  Command line options for opening a trace, shared by the offline commands.
picture.py        A comparison as one HTML page: bars of the balance, and a heat map by layer.
trace.py          `moesaic trace`: inspect, convert, generate and back-test routing traces.
place.py          `moesaic place`: solve, compare, replay and show placements on recorded routing.
report.py         `moesaic report`: a run or a routing trace as one self-contained HTML page.
"""
