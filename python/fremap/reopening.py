"""Windows that are pickled: made anew on their stores, where they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fremap.protection import Prot

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from fremap.window import Window

__all__ = ["reduced"]

Reduced: TypeAlias = "tuple[Callable[..., Window], tuple[Any, ...], dict[str, Any] | None]"

_PLACED = -2  # in `Window.mapping`


def reduced(window: Window, settings: dict[str, Any]) -> Reduced:
    """Return what `object.__reduce__` returns for a window.

    Parameters
    ----------
    window : Window
        Open, and of this process.
    settings : dict
        The settings it was made with that are not asked of it here.

    Returns
    -------
    tuple
        A function, its arguments, and the attributes of a subclass.

    Raises
    ------
    TypeError
        It is closed, or has content that its store does not have.
    """
    if window.closed:
        raise TypeError("a closed Window cannot be pickled")
    mapping = window.mapping
    if (mapping == _PLACED).any():
        raise TypeError(
            "a Window with placed pages cannot be pickled, as they are memory of this process"
        )
    if not window.coherent and window.dirty().any():
        raise TypeError("a Window with changed pages cannot be pickled: flush() it first")
    first = int(mapping[0])
    linear = first >= 0 and np.array_equal(mapping, np.arange(first, first + len(mapping)))
    shown = {"first_page": first} if linear else {"mapping": mapping}
    asked = {
        "engine": window.engine,
        "coherent": window.coherent,
        "lock": window.locked,
        "fault": window.fault,
    }
    made = {**settings, **shown, **asked}
    arguments = (type(window), window.store, window.page_count, made, window.protection())
    return _reopened, arguments, getattr(window, "__dict__", None) or None


def _reopened(
    cls: type[Window],
    store: Any,
    page_count: int,
    settings: dict[str, Any],
    protection: npt.NDArray[np.uint8],
) -> Window:
    """Make a window that shows what the pickled one showed; the store is its alone."""
    window = cls.__new__(cls, store, page_count, **settings)
    for prot in np.unique(protection):
        if prot != settings["prot"]:
            window.protect(np.flatnonzero(protection == prot), Prot(int(prot)))
    return window
