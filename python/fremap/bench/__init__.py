"""`fremap bench`: each speed that fremap claims, measured beside what it is compared with.

``competitors`` is what people do without fremap; ``harness`` pairs rounds and
judges them; ``suites`` are the measurements; ``benches/c/`` in a checkout holds
the bare C loops that bars are about.
"""

from fremap.bench.command import main

__all__ = ["main"]
