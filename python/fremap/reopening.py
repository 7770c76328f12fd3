"""Pickling of windows: unpickling makes a new window on the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fremap.protection import Prot

if TYPE_CHECKING:
    from collections.abc import Callable

    from fremap.window import Window

__all__ = ["reduced"]

Reduced: TypeAlias = "tuple[Callable[..., Window], tuple[Any, ...], Any]"

_PLACED = -2  # in `Window.mapping`


def reduced(base: type[Window], window: Window, settings: dict[str, Any]) -> Reduced:
    """Return what `object.__reduce__` returns for a window.

    Parameters
    ----------
    base : type
        `Window` itself, of which the window's class may be a subclass.
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
    if window.writable and not window.coherent and window.dirty().any():
        raise TypeError("a Window with changed pages cannot be pickled: flush() it first")
    prot = settings["prot"]
    protection = window.protection()
    protected = np.flatnonzero(protection != prot)
    first = int(mapping[0])
    linear = first >= 0 and np.array_equal(mapping, np.arange(first, first + len(mapping)))
    # Pages that are only to be read may repeat others, which a new window would refuse.
    shown = {"first_page": first} if linear else {"mapping": "none"}
    asked = {
        "engine": window.engine,
        "coherent": window.coherent,
        "lock": window.locked,
        "fault": window.fault,
    }
    made = {**settings, **shown, **asked}
    content = {
        "protection": (protected, protection[protected]),
        "mapping": None if linear else mapping,
        # Elsewhere a touch brings what is absent.
        "populated": np.flatnonzero(window.present()) if window.engine == "eager" else None,
    }
    arguments = (base, type(window), window.store, window.page_count, made, content)
    return _reopened, arguments, _attributes(base, window)


def _attributes(base: type[Window], window: Window) -> Any:
    """Return the attributes of a subclass, as pickle sets them."""
    state: Any = window.__getstate__()  # type: ignore[attr-defined, unused-ignore]
    if not isinstance(state, tuple):
        return state
    attributes, slots = state
    slots = {name: value for name, value in slots.items() if name not in base.__slots__}
    return (attributes, slots) if attributes or slots else None


def _reopened(
    base: type[Window],
    cls: type[Window],
    store: Any,
    page_count: int,
    settings: dict[str, Any],
    content: dict[str, Any],
) -> Window:
    """Make a window that shows what the pickled one showed; the store is its alone."""
    # Not by `cls.__new__`, which may have arguments of its own.
    window = base.__new__(cls, store, page_count, **settings)
    pages, prots = content["protection"]
    for prot in np.unique(prots):
        window.protect(pages[prots == prot], Prot(int(prot)))
    mapping = content["mapping"]
    if mapping is not None:
        shown = np.flatnonzero(mapping >= 0)
        window.remap(mapping[shown], at=shown, populate=window.locked)
    if content["populated"] is not None:
        window.populate(content["populated"])
    return window
