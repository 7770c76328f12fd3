"""What actors are asked, how long their answers are waited for, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from fremap.errors import ActorLostError, FremapError, StoreError, TakeTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from fremap.ray.actors import Shard


class Call(NamedTuple):
    """A request to one actor, and where its rows belong: all rows of the round if None."""

    shard: Shard
    refs: list[Any]
    piece_rows: int
    places: npt.NDArray[np.intp] | None


class Round(NamedTuple):
    """What all actors are asked at once, and the memory for it, an element a row."""

    calls: list[Call]
    rows: npt.NDArray[np.void]

    @property
    def refs(self) -> list[Any]:
        """The values to wait for."""
        return [ref for call in self.calls for ref in call.refs]

    @property
    def shards(self) -> list[Shard]:
        """Whose each of these values is."""
        return [call.shard for call in self.calls for _ in call.refs]

    def place(self, values: Sequence[Any]) -> None:
        """Put values where they belong."""
        each = iter(values)
        for call in self.calls:
            for number, _ in enumerate(call.refs):
                part = np.frombuffer(next(each), self.rows.dtype)
                first = number * call.piece_rows
                where: Any = slice(first, first + len(part))
                self.rows[where if call.places is None else call.places[where]] = part

    def cancel(self) -> None:
        """End the requests that no actor has begun."""
        for ref in self.refs:
            ray.cancel(ref)


def submitted(operation: str, shard: Shard, submit: Callable[[], Any]) -> Any:
    """Submit a request; Ray raises a bare `Exception` where it does not know the actor."""
    try:
        return submit()
    except Exception as error:
        raise _lost(operation, shard, error) from error


def got(
    operation: str, refs: Sequence[Any], shards: Sequence[Shard], timeout: float | None
) -> list[Any]:
    """Return the values of `refs`, each of which is of one of `shards`.

    Ray's own waits look for signals once a second, and raise `SystemError` where a handler raises
    while their time ends. Futures are Python's own: Ctrl-C ends a wait for them at once.
    """
    futures = [ref.future() for ref in refs]
    concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_EXCEPTION)
    return _values(operation, futures, shards, timeout)


async def awaited(
    operation: str, refs: Sequence[Any], shards: Sequence[Shard], timeout: float | None
) -> list[Any]:
    """Return the values of `refs` as `got` does, while the event loop goes on."""
    futures = [ref.future() for ref in refs]
    waiters = [asyncio.wrap_future(future) for future in futures]
    await asyncio.wait(waiters, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
    return _values(operation, futures, shards, timeout)


def _values(
    operation: str,
    futures: Sequence[concurrent.futures.Future[Any]],
    shards: Sequence[Shard],
    timeout: float | None,
) -> list[Any]:
    """Return the results of futures that were waited for, or say what went wrong first."""
    errors = [future.exception() if future.done() else None for future in futures]
    for error, shard in zip(errors, shards, strict=True):
        if isinstance(error, RayError):
            raise _failed(operation, shard, error) from error
    late = [shard for future, shard in zip(futures, shards, strict=True) if not future.done()]
    if late:
        raise _timed_out(operation, late, timeout)
    return [future.result() for future in futures]


def _timed_out(operation: str, shards: Iterable[Shard], timeout: float | None) -> TakeTimeoutError:
    late = list(dict.fromkeys(shard.name for shard in shards))
    more = f" and {len(late) - 1} more" if len(late) > 1 else ""
    return TakeTimeoutError(
        f"{operation}: {late[0]}{more} did not answer in {timeout:g} s; ask again, or give a "
        "longer timeout (`ray status` tells whether an actor waits for resources)"
    )


def _failed(operation: str, shard: Shard, error: RayError) -> FremapError:
    """Return what was raised in an actor as if it were raised here, or that the actor is lost."""
    if not isinstance(error, RayTaskError):
        return _lost(operation, shard, error)
    cause = error.cause
    if not isinstance(cause, FremapError):
        return StoreError(errno.EIO, f"{operation}: {shard.name} failed: {cause!r}")
    where, more, row = f"{operation}: {shard.name}", vars(cause), getattr(cause, "row", None)
    if row is not None:
        row += shard.first
        where, more = f"{operation}: row {row} is with {shard.name}", {**more, "row": row}
    told: FremapError
    if isinstance(cause, OSError):
        told = type(cause)(cause.errno, f"{where}: {cause.strerror}", cause.filename)
    else:
        told = type(cause)(f"{where}: {cause}")
    vars(told).update(more)
    return told


def _lost(operation: str, shard: Shard, error: Exception) -> ActorLostError:
    reason = str(error).partition("\n")[0].rstrip(".")
    lost = ActorLostError(
        errno.ECONNRESET,
        f"{operation}: {shard.name} is lost, and Ray does not restart it: {reason}; make the table "
        "anew",
    )
    lost.actor, lost.node = shard.actor_id, shard.node
    return lost
