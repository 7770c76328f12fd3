"""Objects that are closed on the way out of a `with` block."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["ClosedByLast", "ClosedOnExit"]


class _Closable(Protocol):
    def close(self) -> None: ...


_ClosableT = TypeVar("_ClosableT", bound=_Closable)


class ClosedOnExit(ABC):
    """A context manager that closes itself."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Close it."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


class ClosedByLast(Generic[_ClosableT]):
    """Objects with several users; the last user closes them.

    Parameters
    ----------
    shared : tuple
        The objects.
    """

    __slots__ = ("_users", "shared")

    def __init__(self, shared: tuple[_ClosableT, ...]) -> None:
        self.shared = shared
        self._users: weakref.WeakSet[object] = weakref.WeakSet()

    def join(self, user: object) -> None:
        """Have one user more; one that is dropped is none any more."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """Remove a user that was closed."""
        self._users.discard(user)
        if not self._users:
            for one in self.shared:
                one.close()
