"""Checks of arguments that stores and windows share."""

from __future__ import annotations

import math
import operator
import os
import re
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, TypeGuard

import numpy as np

from fremap.dtypes import FOREIGN, bits_of, is_tensor, type_name
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.errors import _system as system_error

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

    from fremap.dtypes import ElementType

# NumPy's own types say only from Python 3.12 on that arrays are buffers.
BufferLike: TypeAlias = "Buffer | npt.NDArray[Any]"

_INT64_MAX = 2**63 - 1
# About 30 years: what a wait of any kind takes.
_MOST_SECONDS = 10**9


def absolute_path(
    operation: str, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]
) -> str | bytes:
    """Return a path that names the same file even after `os.chdir`.

    The kernel alone may resolve ``..`` (behind a symbolic link it is another directory) and
    judge a trailing slash, so nothing is normalized. The empty path stays empty: it names
    no file, where the current directory would be one.
    """
    name = os.fspath(path)
    if not name or (name.startswith("/") if isinstance(name, str) else name.startswith(b"/")):
        return name
    try:
        return (
            os.path.join(os.getcwd(), name)
            if isinstance(name, str)
            else os.path.join(os.getcwdb(), name)
        )
    except OSError as error:  # the current directory was removed, or may not be searched
        number = error.errno or 0
        text = f"{operation}: the current directory has no path: {os.strerror(number)}"
        raise system_error("io", text, number, os.fsencode(name), None, 0) from error


def page_number(pages: object) -> TypeGuard[SupportsIndex]:
    """Tell whether `pages` is one number, not a sequence (some of which claim an index too)."""
    return isinstance(pages, int | np.integer) or (
        hasattr(pages, "__index__") and not hasattr(pages, "__len__")
    )


def quantity(what: str, value: SupportsIndex) -> int:
    """Return a count, size or position as an int that the core can take."""
    if isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(f"{what} must be an integer, not a bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{what} must be an integer, not {type(value).__name__}") from None
    if number < 0:
        raise ArgumentError(f"{what} is {number}; it must not be negative")
    if number > _INT64_MAX:
        raise ArgumentError(f"{what} is {number}; it must be below 2**63")
    return number


def checked_timeout(operation: str, timeout: float | None) -> float | None:
    """Return seconds that a wait may take."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | np.number):
        raise ArgumentTypeError(
            f"{operation}: timeout must be seconds or None, not {type(timeout).__name__}"
        )
    seconds = float(timeout)
    if not 0 < seconds <= _MOST_SECONDS:
        raise ArgumentError(
            f"{operation}: timeout is {timeout}; it must be more than 0 seconds and at most "
            f"{_MOST_SECONDS}, or None for no limit"
        )
    return seconds


def counted(count: int, noun: str) -> str:
    """Return a number of things in words: 1 page, 2 pages."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def refuse_objects(operation: str, what: str, memory: memoryview | npt.NDArray[Any]) -> None:
    """Refuse memory of Python objects: bytes over their pointers end the process.

    Every buffer that a caller gives passes here before its bytes are read or written. The
    format does not tell of ctypes' unions and packed structures, their types do.
    """
    if isinstance(memory, memoryview):
        letters = re.sub(":[^:]*:", "", memory.format)
        objects = "O" in letters or _has_objects(type(memory.obj))
    else:
        objects = memory.dtype.hasobject
    if objects:
        raise ArgumentTypeError(
            f"{operation}: {what} holds Python objects, whose bytes are pointers; give memory of "
            "numbers or bytes"
        )


def _has_objects(kind: type) -> bool:
    """Tell whether a type of ctypes has a ``py_object`` in it."""
    if type(kind).__module__ != "_ctypes":
        return False
    inner: object = getattr(kind, "_type_", None)
    if isinstance(inner, type) and hasattr(kind, "_length_"):
        return _has_objects(inner)
    fields = (field for base in kind.__mro__ for field in base.__dict__.get("_fields_", ()))
    return inner == "O" or any(_has_objects(field[1]) for field in fields)


def filled_memory(
    operation: str, out: Any, element: ElementType, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Return the memory of `out` as an array of `element` and `shape`, which it must hold.

    What has a dtype must have this one, and this shape; plain bytes need the right length.
    """
    array = _shared_array(operation, out)
    refuse_objects(operation, "out", array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        raise ArgumentError(f"{operation}: out must be writable and C-contiguous")
    dtype = element.dtype
    if array.shape == shape:
        if array.dtype == dtype:
            return array
        if element.name in FOREIGN and type_name(out if is_tensor(out) else array) == element.name:
            return array.view(dtype)
    expected = math.prod(shape) * dtype.itemsize
    if array.dtype == np.uint8 and array.shape == (expected,):
        return array.view(dtype).reshape(shape)
    found = type_name(out) if is_tensor(out) else array.dtype
    wanted = element.name if element.foreign else dtype
    raise ArgumentError(
        f"{operation}: out is {found} of shape {array.shape}; it must be {wanted} of shape "
        f"{shape}, or {expected} bytes"
    )


def _shared_array(operation: str, out: Any) -> npt.NDArray[Any]:
    """Return an array over the memory of `out`, never over a copy of it."""
    if isinstance(out, np.ndarray):
        return out
    if is_tensor(out):
        return bits_of(operation, out)
    if hasattr(out, "__array__") and hasattr(out, "data_ptr"):
        # A tensor of another library: its own array shows its memory, if it can have one.
        try:
            array = np.asarray(out)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentTypeError(
                f"{operation}: out is a tensor that NumPy cannot write to ({error}); give one in "
                "memory, and of a type that NumPy has"
            ) from error
        if array.size == 0 or array.ctypes.data == out.data_ptr():
            return array
    elif hasattr(out, "__array_interface__"):
        return np.asarray(out)
    else:
        try:
            view = memoryview(out)
            refuse_objects(operation, "out", view)
            return np.asarray(view)
        except ArgumentTypeError:
            raise
        except (TypeError, ValueError):
            pass
    raise ArgumentTypeError(f"{operation}: out must be memory, not {type(out).__name__}")


def bytes_of(operation: str, data: BufferLike, sizes: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return `data` as flat uint8, without a copy where that can be; its size is one of `sizes`."""
    array = _array(operation, data)
    refuse_objects(operation, "data", array)
    flat: npt.NDArray[np.uint8] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if len(flat) not in sizes:
        wanted = " or ".join(str(size) for size in dict.fromkeys(sizes))
        raise ArgumentError(f"{operation}: data has {len(flat)} bytes; it must have {wanted}")
    return flat


def _array(operation: str, data: Any) -> npt.NDArray[Any]:
    if hasattr(data, "__array__"):
        return np.asarray(data)
    try:
        view = memoryview(data)
    except TypeError:
        raise ArgumentTypeError(
            f"{operation}: data must be a buffer or an array, not {type(data).__name__}"
        ) from None
    refuse_objects(operation, "data", view)
    return np.asarray(view)
