"""Types that NumPy does not have, as torch's and as ml_dtypes': what is shown, what is filled."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
import safetensors
from fremap.errors import ArgumentError, ArgumentTypeError

pytestmark = pytest.mark.any_user

needs_torch = pytest.mark.needs("torch")
needs_ml_dtypes = pytest.mark.needs("ml_dtypes")

FOREIGN = [
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
]
SHARED = ["bool", "uint8", "int16", "float16", "float32", "float64", "complex64", "uint32"]
BITS = np.random.default_rng(8).integers(0, 2, (20, 24), np.uint8)  # 0 and 1: good bools
IDS = np.array([19, 0, 7, 7])


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[[str], Path]:
    """`file_of(type)` is a file of the library of the format, whose bytes are `BITS`."""

    def make(dtype: str) -> Path:
        path = tmp_path / f"{dtype}.safetensors"
        item_bytes = (
            2 if dtype == "bfloat16" else 1 if "float8" in dtype else np.dtype(dtype).itemsize
        )
        shape = [20, 24 // item_bytes]
        if hasattr(safetensors, "TensorSpec"):
            spec = safetensors.TensorSpec(
                dtype=dtype, shape=shape, data_ptr=BITS.ctypes.data, data_len=BITS.nbytes
            )
        else:  # before 0.8
            spec = {"dtype": dtype, "shape": shape, "data": BITS.tobytes()}
        safetensors.serialize_file({"t": spec}, path)
        return path

    return make


@needs_torch
@pytest.mark.parametrize("name", FOREIGN + SHARED)
def test_tensors_of_each_type(file_of: Callable[[str], Path], name: str) -> None:
    import torch

    dtype = getattr(torch, name)
    with fremap.rows(file_of(name)) as rows:
        out = torch.empty((4, rows.row_shape[0]), dtype=dtype)
        assert rows.take(IDS, out=out) is out
        assert out.view(torch.uint8).numpy().tobytes() == BITS[IDS].tobytes()
        part = torch.zeros((9, rows.row_shape[0]), dtype=dtype)
        rows.take(IDS, out=part[2:6])
        assert part[2:6].view(torch.uint8).numpy().tobytes() == BITS[IDS].tobytes()
        assert not part[:2].view(torch.uint8).any()
        flat = torch.empty(4 * 24, dtype=torch.uint8)
        rows.take(IDS, out=flat)
        assert flat.numpy().tobytes() == BITS[IDS].tobytes()
    with fremap.rows(file_of(name), dtype) as rows:
        assert rows.dtype is dtype
        assert rows.dtype_name == name
        for taken in (rows.take(IDS), rows[IDS], rows[IDS, :], rows[...][IDS]):
            assert taken.dtype is dtype
            assert taken.view(torch.uint8).numpy().tobytes() == BITS[IDS].tobytes()
        assert rows[3].shape == rows.row_shape
        assert np.asarray(rows).tobytes() == BITS.tobytes()
        assert rows[3, 1].dtype is dtype
        batch = next(rows.batches(4, IDS))
        assert batch.dtype is dtype
        assert batch.view(torch.uint8).numpy().tobytes() == BITS[IDS].tobytes()
        assert pickle.loads(pickle.dumps(rows)).dtype is dtype


@needs_torch
def test_tensors_that_cannot_be_filled(file_of: Callable[[str], Path]) -> None:
    import torch

    with fremap.rows(file_of("bfloat16")) as rows:
        for out, error, text in (
            (torch.empty((4, 12), dtype=torch.float16), ArgumentError, "it must be bfloat16"),
            (torch.empty((4, 11), dtype=torch.bfloat16), ArgumentError, "bfloat16 of shape"),
            (torch.empty((12, 4), dtype=torch.bfloat16).T, ArgumentError, "C-contiguous"),
            (torch.empty((4, 12), dtype=torch.bfloat16, device="meta"), TypeError, "on meta"),
            (
                torch.empty((4, 12), dtype=torch.bfloat16, requires_grad=True),
                ArgumentTypeError,
                "wants a gradient",
            ),
            (torch.empty((4, 12), dtype=torch.bfloat16).to_sparse(), TypeError, "tensor"),
        ):
            with pytest.raises(error, match=text):
                rows.take(IDS, out=out)
    for dtype, error, text in (
        (torch.float16, ArgumentError, "holds bfloat16, not torch.float16"),
        (np.float16, ArgumentError, "holds bfloat16, not float16"),
        (torch.quint8, ArgumentTypeError, "not a type of whole bytes"),
    ):
        with pytest.raises(error, match=text):
            fremap.rows(file_of("bfloat16"), dtype)


@needs_torch
def test_raw_bytes_as_tensors(tmp_path: Path) -> None:
    import torch

    values = torch.randn(30, 4).to(torch.bfloat16)
    path = tmp_path / "raw.bin"
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    with fremap.rows(path, torch.bfloat16, 4) as rows:
        assert torch.equal(rows[[3, -1]], values[[3, -1]])


@needs_ml_dtypes
@pytest.mark.parametrize("name", FOREIGN)
def test_arrays_of_ml_dtypes(file_of: Callable[[str], Path], name: str) -> None:
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, name))
    with fremap.rows(file_of(name)) as rows:
        assert rows.dtype.kind == "u"
        out = np.empty((4, *rows.row_shape), dtype)
        assert rows.take(IDS, out=out) is out
        assert out.tobytes() == BITS[IDS].tobytes()
    for said in (dtype, getattr(ml_dtypes, name), name):
        with fremap.rows(file_of(name), said) as rows:
            assert rows.dtype == dtype
            assert rows.dtype_name == name
            assert rows[IDS].dtype == dtype
            assert rows[IDS].tobytes() == BITS[IDS].tobytes()
            assert next(rows.batches(4, IDS)).dtype == dtype
    other = "float8_e5m2" if name == "float8_e4m3fn" else "float8_e4m3fn"
    with pytest.raises(ArgumentError, match=f"holds {name}, not {other}"):
        fremap.rows(file_of(name), other)
    with fremap.rows(file_of(name)) as rows, pytest.raises(ArgumentError, match=f"must be {name}"):
        rows.take(IDS, out=np.empty((4, *rows.row_shape), getattr(ml_dtypes, other)))


def test_bits_of_a_type_that_numpy_has_not(file_of: Callable[[str], Path]) -> None:
    """They may be said to be integers or plain bytes; numbers of another type they are not."""
    for said in (np.uint16, np.int16, "V2"):
        with fremap.rows(file_of("bfloat16"), said) as rows:
            assert rows.dtype == said
            assert rows[IDS].tobytes() == BITS[IDS].tobytes()
    for said in (np.float16, np.float32, np.uint8, "S2"):
        with pytest.raises(ArgumentError, match="holds bfloat16, not"):
            fremap.rows(file_of("bfloat16"), said)


def test_a_type_that_nobody_knows(file_of: Callable[[str], Path]) -> None:
    with pytest.raises(ArgumentTypeError, match="rows: dtype is 'bfloat17'"):
        fremap.rows(file_of("bfloat16"), "bfloat17")


def test_other_types_are_as_they_were(file_of: Callable[[str], Path]) -> None:
    with pytest.raises(ArgumentError, match="holds float32, not"):
        fremap.rows(file_of("float32"), np.int32)
    with fremap.rows(file_of("float32"), "<f4") as rows:
        out: Any = np.empty((4, 6), ">f4")
        with pytest.raises(ArgumentError, match="out is >f4"):
            rows.take(IDS, out=out)


@needs_torch
def test_numbers_of_the_other_byte_order_are_no_tensors(tmp_path: Path) -> None:
    import torch

    np.save(tmp_path / "big.npy", np.arange(4, dtype=">f4"))
    with pytest.raises(ArgumentError, match=r"holds >f4, not torch\.float32"):
        fremap.rows(tmp_path / "big.npy", torch.float32)


def test_names_of_ml_dtypes_without_it(
    file_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ArgumentError, match="pip install ml_dtypes, or say"):
        fremap.rows(file_of("bfloat16"), "bfloat16")
