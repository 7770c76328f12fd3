"""Types of elements: NumPy's own, and those that only torch and ml_dtypes have.

Neither is imported unless a caller has it already, or asks for it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fremap.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "MAX_AXES",
    "ElementType",
    "TypeLike",
    "bits_of",
    "empty",
    "is_tensor",
    "said_type",
    "shown_as",
]

#: Axes of an array, as NumPy has them.
MAX_AXES = 64 if int(np.__version__.split(".")[0]) >= 2 else 32
#: Bytes of the types that NumPy does not have, by the name that torch and ml_dtypes share.
FOREIGN = {
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
}
_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}

# Whatever `numpy.dtype` takes, a name of `FOREIGN`, or a dtype of torch's.
TypeLike: TypeAlias = "npt.DTypeLike | Any"


class ElementType(NamedTuple):
    """What elements are.

    Attributes
    ----------
    dtype : numpy.dtype
        What arrays of them have: their type, or as many bytes where NumPy has none.
    name : str
        What they are.
    shown : dtype
        What `Rows.dtype` says: `dtype`, or torch's where a caller asked for that.
    """

    dtype: np.dtype[Any]
    name: str
    shown: Any

    @property
    def foreign(self) -> bool:
        """Whether the arrays have bytes only, as NumPy does not have the type."""
        return self.name != self.dtype.name

    def said(self, asked: ElementType) -> ElementType | None:
        """Return this type as a caller says it; None if it is not what he says.

        Bytes of a type that NumPy does not have may be said to be integers or plain bytes of
        that size, which show their bits; no other type of that size, whose numbers are wrong.
        """
        if asked.name == self.name and (self.name in FOREIGN or asked.dtype == self.dtype):
            return asked
        plain = (
            asked.dtype.kind in "ui" and asked.dtype.isbuiltin == 1
        ) or asked.dtype.type is np.void
        if self.foreign and plain and asked.dtype.itemsize == self.dtype.itemsize:
            return ElementType(asked.dtype, self.name, asked.shown)
        return None


def said_type(operation: str, dtype: TypeLike) -> ElementType:
    """Return the type that a caller says, be it NumPy's, ml_dtypes' or torch's.

    Parameters
    ----------
    operation : str
        What messages begin with.
    dtype : dtype
        The type.

    Returns
    -------
    ElementType
        The type.
    """
    if type(dtype).__module__ == "torch" and type(dtype).__name__ == "dtype":
        name = str(dtype).removeprefix("torch.")
        if name in FOREIGN:
            return ElementType(np.dtype(_UNSIGNED[FOREIGN[name]]), name, dtype)
        try:
            return ElementType(np.dtype(name), name, dtype)
        except TypeError:
            raise ArgumentTypeError(
                f"{operation}: dtype is {dtype}, which is not a type of whole bytes"
            ) from None
    if isinstance(dtype, str) and dtype in FOREIGN:
        try:
            import ml_dtypes
        except ImportError as error:
            raise ArgumentError(
                f"{operation}: NumPy has no type {dtype!r}; pip install ml_dtypes, or say "
                f"dtype=torch.{dtype}"
            ) from error
        dtype = getattr(ml_dtypes, dtype)
    try:
        said = np.dtype(dtype)
    except TypeError as error:
        raise ArgumentTypeError(f"{operation}: dtype is {dtype!r}: {error}") from None
    return ElementType(said, said.name, said)


def is_tensor(value: object) -> bool:
    """Tell whether a value is a tensor of torch's."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def bits_of(operation: str, tensor: Any) -> npt.NDArray[Any]:
    """Return an array over the memory of a tensor, of as many bytes where NumPy lacks its type.

    Parameters
    ----------
    operation : str
        What messages begin with.
    tensor : torch.Tensor
        The tensor.

    Returns
    -------
    ndarray
        The same memory.
    """
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise ArgumentTypeError(
            f"{operation}: out is a tensor on {tensor.device}; give one in memory (pinned, to copy "
            "it from there: tensor.copy_(out, non_blocking=True))"
        )
    if tensor.requires_grad:
        raise ArgumentTypeError(
            f"{operation}: out is a tensor that wants a gradient; give tensor.detach()"
        )
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        if name in FOREIGN:
            tensor = tensor.view(torch.uint8 if FOREIGN[name] == 1 else torch.uint16)
        array: npt.NDArray[Any] = tensor.numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"{operation}: out is a tensor that NumPy cannot write to ({error})"
        ) from error
    return array


def type_name(memory: Any) -> str:
    """Return what the elements of an array or tensor are."""
    return str(memory.dtype).removeprefix("torch.") if is_tensor(memory) else memory.dtype.name


def shown_as(array: npt.NDArray[Any], shown: Any) -> Any:
    """Return an array as what a caller asked to see: itself, or a tensor over its memory.

    Parameters
    ----------
    array : ndarray
        Of the type's own dtype.
    shown : dtype
        `ElementType.shown`.

    Returns
    -------
    ndarray or torch.Tensor
        The same memory.
    """
    if isinstance(shown, np.dtype):
        return array
    torch = sys.modules["torch"]
    return torch.from_numpy(np.asarray(array)).view(shown)


def empty(shape: tuple[int, ...], shown: Any) -> Any:
    """Return memory for rows, as an array or a tensor.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    shown : dtype
        NumPy's or torch's.

    Returns
    -------
    ndarray or torch.Tensor
        Of any content.
    """
    if isinstance(shown, np.dtype):
        return np.empty(shape, shown)
    return sys.modules["torch"].empty(shape, dtype=shown)
