"""What a window shows, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from fremap import _core
from fremap.settings import Shape, elements_within

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.stores import Store

__all__ = ["Views"]

_Scalar = TypeVar("_Scalar", bound=np.generic)


class Views(_core.WindowBase):
    """A window's mapping, and its memory without a copy."""

    __slots__ = ()

    if TYPE_CHECKING:
        _store: Store

        # The compiled class exports its memory; Python shows that as a method from 3.12 on.
        def __buffer__(self, flags: int, /) -> memoryview: ...

    @property
    def mapping(self) -> npt.NDArray[np.int64]:
        """File page that each window page shows; -1 none, -2 placed. A copy."""
        return np.frombuffer(self._mapping(), dtype=np.int64)

    @property
    def pages(self) -> npt.NDArray[np.uint8]:
        """The window's memory as uint8, shape (page_count, page_bytes), without a copy."""
        return self.array(np.uint8, (self.page_count, self.page_bytes))

    @overload
    def array(
        self, dtype: type[_Scalar] | np.dtype[_Scalar], shape: Shape = None
    ) -> npt.NDArray[_Scalar]: ...

    @overload
    def array(self, dtype: npt.DTypeLike, shape: Shape = None) -> npt.NDArray[Any]: ...

    def array(self, dtype: npt.DTypeLike, shape: Shape = None) -> npt.NDArray[Any]:
        """Show the window's memory as an array, without a copy.

        Parameters
        ----------
        dtype : dtype
            Type of the elements; no Python objects.
        shape : int or sequence of int, optional
            One dimension may be -1; as many elements as fit if not given. A
            smaller array shows the front of the window.

        Returns
        -------
        ndarray
            A view, read-only unless the window may be written. While it lives
            the window cannot be closed.

        Raises
        ------
        ArgumentError
            The shape does not fit into the window, or an element would lie in two files
            of a `ConcatStore`.
        ArgumentTypeError
            The dtype holds Python objects or has no size.

        Notes
        -----
        Touching an absent page makes it present (a fault); a page that cannot
        be read is SIGBUS, with a line on stderr.

        Examples
        --------
        >>> import fremap, numpy as np
        >>> store = fremap.MemoryStore(2 * 4096, page_bytes=4096)
        >>> with fremap.Window(store) as window:
        ...     window.array(np.float32, (-1, 512)).shape
        (4, 512)
        """
        elements = elements_within(dtype, shape, self.page_count * self.page_bytes)
        self._store._check_elements(elements, self)  # noqa: SLF001 - the wrapper's other half
        memory = np.frombuffer(memoryview(self), dtype=np.uint8)
        view: npt.NDArray[Any] = memory[: elements.used_bytes].view(elements.dtype)
        return view.reshape(elements.shape)
