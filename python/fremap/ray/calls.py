"""What actors are asked, how long their answers are waited for, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import errno
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fremap.errors import ActorLostError, FremapError, StoreError, TakeTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from fremap.ray.actors import Shard

# How soon Ctrl-C ends a wait: Ray itself looks for signals once a second.
_SIGNAL_SECONDS = 0.1


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
    """Return the values of `refs`, each of which is of one of `shards`."""
    until = None if timeout is None else time.monotonic() + timeout
    wait = _SIGNAL_SECONDS
    while True:
        if until is not None:
            wait = max(0.0, min(wait, until - time.monotonic()))
        try:
            return list(ray.get(list(refs), timeout=wait))
        except GetTimeoutError:
            if wait == 0.0:
                _, left = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
                late = [shard for ref, shard in zip(refs, shards, strict=True) if ref in left]
                raise _timed_out(operation, late or shards, timeout) from None
        except RayError as error:
            raise _failed(operation, _failing(refs, shards), error) from error


def _failing(refs: Sequence[Any], shards: Sequence[Shard]) -> Shard:
    """Return whose value cannot be had; Ray does not say it of several."""
    for ref, shard in zip(refs, shards, strict=True):
        try:
            ray.get(ref, timeout=0)
        except GetTimeoutError:
            continue
        except RayError:
            return shard
    return shards[0]


async def awaited(asked: Round, timeout: float | None) -> list[Any]:
    """Return the values of a round, as `got` does."""
    futures = [asyncio.wrap_future(ref.future()) for ref in asked.refs]
    try:
        return await asyncio.wait_for(asyncio.gather(*futures), timeout)
    except RayError as error:
        failed = (future.done() and future.exception() is error for future in futures)
        shard = next(one for one, failing in zip(asked.shards, failed, strict=True) if failing)
        raise _failed("take", shard, error) from error
    except TimeoutError:
        raise _timed_out("take", asked.shards, timeout) from None


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
        f"{operation}: {shard.name} is lost: {reason}; make the table anew (more max_restarts in "
        "actor_options would have Ray restart it)",
    )
    lost.actor, lost.node = shard.actor_id, shard.node
    return lost
