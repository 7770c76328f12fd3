"""What actors are asked, how long their answers are waited for, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.runtime_context import get_runtime_context

from fremap.errors import ActorLostError, FremapError, StoreError, TakeTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from fremap.ray.actors import Shard

#: Whether the process has left Ray is looked at so often: no answer comes then, and no error.
_LOOK_SECONDS = 1.0
#: What becomes of an actor that never ran, or does not run any more.
_ENDS = (
    ActorPlacementGroupRemoved, ActorUnschedulableError, RayActorError, RuntimeEnvSetupError,
)  # fmt: skip


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

    def place(self, values: list[Any]) -> None:
        """Put values where they belong, and let them go: they hold memory of the object store."""
        each = iter(values)
        for call in self.calls:
            for number, _ in enumerate(call.refs):
                part = np.frombuffer(next(each), self.rows.dtype)
                first = number * call.piece_rows
                where: Any = slice(first, first + len(part))
                self.rows[where if call.places is None else call.places[where]] = part
        values.clear()

    def cancel(self) -> None:
        """End the requests that no actor has begun."""
        for ref in self.refs:
            ray.cancel(ref)


def session() -> tuple[str, str] | None:
    """Return what tells this connection to Ray from a later one; None without one.

    `ray.shutdown` ends it, at any time in another thread. Most calls of Ray would then start a new
    Ray on this machine, `ray.get_runtime_context` too, but not the function that it wraps.
    """
    if not ray.is_initialized():
        return None
    now = get_runtime_context()
    try:
        return now.get_node_id(), now.get_worker_id()
    except (AttributeError, RuntimeError):
        if ray.is_initialized():
            raise
        return None


def left(operation: str) -> ActorLostError:
    """Make the error for a process that is not, or not any more, in the Ray of its actors."""
    return ActorLostError(
        errno.ENOTCONN,
        f"{operation}: this process has left Ray (ray.shutdown), and the actors with it; make the "
        "table anew",
    )


def submitted(operation: str, shard: Shard, submit: Callable[[], Any]) -> Any:
    """Submit a request; Ray raises a bare `Exception` where it does not know the actor."""
    try:
        return submit()
    except Exception as error:
        failure = _unanswered if isinstance(error, RayError) else _lost
        raise failure(operation, shard, error) from error


def got(
    operation: str,
    refs: Sequence[Any],
    shards: Sequence[Shard],
    timeout: float | None,
    here: tuple[str, str] | None,
) -> list[Any]:
    """Return the values of `refs`, each of which is of one of `shards`, all in `session` `here`.

    Ray's own waits look for signals once a second, and raise `SystemError` where a handler raises
    while their time ends. Futures are Python's own: Ctrl-C ends a wait for them at once.
    """
    end, futures = _end(timeout), _futures(operation, refs, here)
    while _is_awaited(futures) and (seconds := _seconds_until(end)) > 0:
        concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_EXCEPTION)
        if session() != here:
            raise left(operation)
    return _values(operation, futures, shards, timeout)


async def awaited(
    operation: str,
    refs: Sequence[Any],
    shards: Sequence[Shard],
    timeout: float | None,
    here: tuple[str, str] | None,
) -> list[Any]:
    """Return the values of `refs` as `got` does, while the event loop goes on."""
    end, futures = _end(timeout), _futures(operation, refs, here)
    waiters = [asyncio.wrap_future(future) for future in futures]
    for waiter in waiters:
        waiter.add_done_callback(_seen)
    while _is_awaited(futures) and (seconds := _seconds_until(end)) > 0:
        await asyncio.wait(waiters, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        if session() != here:
            raise left(operation)
    return _values(operation, futures, shards, timeout)


def _futures(
    operation: str, refs: Sequence[Any], here: tuple[str, str] | None
) -> list[concurrent.futures.Future[Any]]:
    if here is None or session() != here:
        raise left(operation)
    return [ref.future() for ref in refs]


def _seen(waiter: asyncio.Future[Any]) -> None:
    """Look at the exception, which the future behind it tells: asyncio logs those nobody saw."""
    if not waiter.cancelled():
        waiter.exception()


def _end(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _seconds_until(end: float | None) -> float:
    """Return how long to wait before looking around; not above 0 if it is late already."""
    return _LOOK_SECONDS if end is None else min(_LOOK_SECONDS, end - time.monotonic())


def _is_awaited(futures: Sequence[concurrent.futures.Future[Any]]) -> bool:
    """Tell whether there is something to wait for: an answer, and no error so far."""
    done = [future for future in futures if future.done()]
    return len(done) < len(futures) and not any(future.exception() for future in done)


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
        return _unanswered(operation, shard, error)
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


def _unanswered(operation: str, shard: Shard, error: Exception) -> StoreError:
    """Return why there is no answer of an actor, which may be well."""
    if isinstance(error, ActorUnavailableError):
        what = f"cannot be reached now ({_reason(error)}); ask again"
        return _of(shard, ActorLostError(errno.ECONNRESET, f"{operation}: {shard.name} {what}"))
    if isinstance(error, _ENDS):
        return _lost(operation, shard, error)
    what = f"Ray brings no answer of {shard.name}: {_reason(error)}"
    return StoreError(errno.EIO, f"{operation}: {what}")


def _lost(operation: str, shard: Shard, error: Exception) -> ActorLostError:
    return _of(
        shard,
        ActorLostError(
            errno.ECONNRESET,
            f"{operation}: {shard.name} is lost, and Ray does not restart it: {_reason(error)}; "
            "make the table anew",
        ),
    )


def _of(shard: Shard, lost: ActorLostError) -> ActorLostError:
    lost.actor, lost.node = shard.actor_id, shard.node
    return lost


def _reason(error: Exception) -> str:
    """Return what Ray says first; it goes on for pages."""
    return str(error).strip().partition("\n")[0].rstrip(".:")
