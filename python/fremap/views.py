"""The mapping of a window, the states of its pages, and its memory, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from fremap import _core
from fremap.selection import CoreSelection, Numbering, PageSelection
from fremap.settings import Shape, elements_within

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.stores import Store

__all__ = ["Views"]

_Scalar = TypeVar("_Scalar", bound=np.generic)


class Views(_core.WindowBase):
    """A window's mapping, the state of its pages, and its memory without a copy."""

    __slots__ = ()

    if TYPE_CHECKING:
        _store: Store

        # The compiled class exports its memory; Python shows that as a method from 3.12 on.
        def __buffer__(self, flags: int, /) -> memoryview: ...

    def _select(self, operation: str, pages: PageSelection) -> tuple[CoreSelection, int]:
        numbering = Numbering(operation, "window page", self.page_count)
        selection = numbering.selection(pages)
        return selection, numbering.count(selection)

    @property
    def mapping(self) -> npt.NDArray[np.int64]:
        """File page that each window page shows, -1 for nothing, -2 for placed pages. A copy."""
        return np.frombuffer(self._mapping(None), dtype=np.int64)

    def _shown(self, pages: CoreSelection) -> npt.NDArray[np.int64]:
        """Return the file page that each of these window pages shows, as in `mapping`."""
        return np.frombuffer(self._mapping(pages), dtype=np.int64)

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
            One dimension may be -1. Default: as many elements as fit. A smaller array shows the
            beginning of the window.

        Returns
        -------
        ndarray
            A view, read-only unless the window is writable. The window cannot be closed while
            it exists.

        Raises
        ------
        ArgumentError
            The shape does not fit into the window, or an element would lie in two files
            of a `ConcatStore`.
        ArgumentTypeError
            The dtype holds Python objects or has no size.

        Notes
        -----
        Touching an absent page loads it (a fault). If it cannot be read, fremap prints a line on
        stderr and the touch raises SIGBUS.

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

    def present(self, pages: PageSelection = None) -> npt.NDArray[np.bool_]:
        """Tell which pages are present, so that touching them causes no fault.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page asked for; a snapshot.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        StoreError
            The kernel's page map cannot be read (engine "alias").

        Notes
        -----
        Engine "alias" reads ``/proc/self/pagemap``. The kernel may unmap its pages at any time, to
        reclaim their memory or to move them elsewhere; the next touch maps them again.
        """
        selection, _ = self._select("present", pages)
        return np.frombuffer(self._present(selection), dtype=np.bool_)

    def dirty(self, pages: PageSelection = None) -> npt.NDArray[np.bool_]:
        """Tell which pages have content that is not in the store yet.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page asked for; a snapshot.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        UnsupportedError
            The window is coherent: its writes are in the file at once.

        Notes
        -----
        Engine "paged": ``PAGEMAP_SCAN`` (Linux 6.7), or the faults that were served. A page that
        was written to is dirty, even if the content is the same. Engine "eager": the content is
        hashed and compared with what was loaded, a quarter of a microsecond a page.
        """
        selection, _ = self._select("dirty", pages)
        return np.frombuffer(self._dirty(selection), dtype=np.bool_)

    def protection(self, pages: PageSelection = None) -> npt.NDArray[np.uint8]:
        """Tell the protection of each page.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.

        Returns
        -------
        ndarray of uint8, shape (n,)
            For each page asked for, a value of `Prot`.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        """
        selection, _ = self._select("protection", pages)
        return np.frombuffer(self._protection(selection), dtype=np.uint8)

    def pinned(self, pages: PageSelection = None) -> npt.NDArray[np.bool_]:
        """Tell which pages are pinned.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page asked for; a snapshot.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        """
        selection, _ = self._select("pinned", pages)
        return np.frombuffer(self._pinned(selection), dtype=np.bool_)
