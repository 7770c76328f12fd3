"""A table whose rows lie on several machines, each of which reads its own: on Ray.

An actor on each machine opens files by `fremap.rows` and knows nothing of the others. The client,
`DistributedRows`, knows how many rows each actor has. A take does four things:

1. It checks the ids as `Rows.take` does, finds the actor of each (one `searchsorted`), and sorts
   them by actor.
2. It asks all actors at once, in rounds of 16 MiB of rows or more. While it puts the rows of one
   round in place, the next round is under way. So a take of any size needs little of Ray's object
   store.
3. Up to 768 KiB of an actor's rows travel in the answer itself, as return values that are each
   small enough for Ray to send inline; more travel through the object store, where the client
   reads them without a copy (docs/decisions/021-rows-on-several-machines.md).
4. It copies the rows into `out`, in the order of the ids.

Reads change nothing, so Ray repeats them where an actor was restarted. Every request says which
files the table was opened with: an actor that was restarted and finds others, or another version
of an object on a server, refuses it. An actor's constructor never raises, because Ray aborts such a
process: the first request raises instead.

`table` has the client, `calls` what is asked and answered, `actors` the other end and where it
runs. Nothing else of fremap imports Ray, which it does not depend on.
"""

try:
    import ray as _  # noqa: F401 - or the error would name one of its modules
except ImportError as error:
    raise ImportError("fremap.ray needs Ray, which is missing: pip install ray") from error

from fremap.ray.table import DistributedRows

__all__ = ["DistributedRows"]
