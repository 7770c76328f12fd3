"""A take that runs while its caller does something else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fremap.errors import ForkError, TakeCancelledError, TakeTimeoutError

if TYPE_CHECKING:
    from collections.abc import Generator

    from fremap import _core

__all__ = ["Pending"]


class Pending:
    """A running take; what `Rows.submit` and `Ragged.submit` return.

    It keeps the memory of `out` until the last read into it has ended, even if the take is
    cancelled or this object is dropped. No Python thread runs it.

    Parameters
    ----------
    core : object
        The core's half; `Rows.submit` has it.
    taken : ndarray, torch.Tensor or RaggedRows
        What `result` returns.

    See Also
    --------
    Rows.submit : Begins one.

    Notes
    -----
    ``await pending`` returns the same as `result`, on any event loop that watches descriptors.
    Cancelling the awaiting task cancels the take.

    Any number of threads may wait. A child of fork cannot wait for a take of its parent
    (`ForkError`).

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     np.arange(10, dtype=np.int16).tofile(file.name)
    ...     with fremap.rows(file.name, np.int16, 2) as pairs:
    ...         pending = pairs.submit([4, 0])
    ...         pending.result().tolist()
    [[8, 9], [0, 1]]
    """

    __slots__ = ("_core", "_taken")

    def __init__(self, core: _core.Pending, taken: Any) -> None:
        self._core = core
        self._taken = taken

    def done(self) -> bool:
        """Return whether the take has ended: with its rows, an error, or cancelled.

        Returns
        -------
        bool
            False while it is running.
        """
        return self._core.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the take has ended.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.

        Returns
        -------
        bool
            Whether it has ended.
        """
        return self._core.wait(timeout)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the take, and return the rows.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.

        Returns
        -------
        ndarray, torch.Tensor or RaggedRows
            The rows as `take` returns them; over the memory of `out` if it was given.

        Raises
        ------
        FremapError
            As `take`, each time it is called.
        TakeTimeoutError
            The time is over; the take is still running. Also a `TimeoutError`.
        TakeCancelledError
            `cancel` was called before all rows were read.
        """
        if not self._core.wait(timeout):
            raise TakeTimeoutError(
                f"take: not done after {timeout:g} s; it is still running: call result() again, or "
                "cancel()"
            )
        if self._core.cancelled():
            raise TakeCancelledError("take: it was cancelled before all rows were read")
        self._core.check()
        return self._taken

    def cancel(self) -> None:
        """End the take early.

        Reads in flight end first: memory given as `out` may be written until `done` returns
        True. This does nothing to a take that has ended.
        """
        self._core.cancel()

    def cancelled(self) -> bool:
        """Return whether the take has ended because of `cancel`.

        Returns
        -------
        bool
            False while it is still running, too.
        """
        return self._core.cancelled()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._ended().__await__()

    async def _ended(self) -> Any:
        import asyncio

        if not self._core.done():
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            event = self._core.event()
            try:
                loop.add_reader(event, _set, waiter)
                try:
                    await waiter
                except asyncio.CancelledError:
                    self.cancel()
                    raise
                finally:
                    loop.remove_reader(event)
            finally:
                os.close(event)
        return self.result(0)

    def __repr__(self) -> str:
        try:
            if not self._core.done():
                state = "under way"
            else:
                state = "cancelled" if self._core.cancelled() else "done"
        except ForkError:
            state = "of another process"
        array = self._taken[0] if isinstance(self._taken, tuple) else self._taken
        return f"<fremap.Pending: {array.shape} of {array.dtype}, {state}>"


def _set(waiter: Any) -> None:
    if not waiter.done():
        waiter.set_result(None)
