"""Pages that are kept in a window for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fremap.selection import CoreSelection

__all__ = ["Pin"]


class Pinning(Protocol):
    """A window, as far as a pin needs it."""

    @property
    def closed(self) -> bool:
        """Whether there is nothing to unpin any more."""
        ...

    def _unpin(self, pages: CoreSelection, /) -> None: ...


class Pin:
    """Pages of a window that stay present until this is released.

    Made by `Window.pin`.
    """

    __slots__ = ("_pages", "_window")

    def __init__(self, window: Pinning, pages: CoreSelection) -> None:
        self._window: Pinning | None = window
        self._pages = pages

    def __repr__(self) -> str:
        """Describe the pin in a line."""
        state = "released" if self._window is None else f"of {self._window!r}"
        return f"<fremap.Pin, {state}>"

    def __enter__(self) -> Self:
        """Return the pin itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the pages."""
        self.release()

    def release(self) -> None:
        """Let the pages leave again; later calls do nothing."""
        window, self._window = self._window, None
        if window is not None and not window.closed:
            window._unpin(self._pages)  # noqa: SLF001 - the window's other half
