"""What a type checker makes of fremap; `make check-python` runs mypy on it, nothing runs it.

An expected error is ignored by its code. Should mypy no longer report it, the comment is
unused, which is an error in turn.
"""

from pathlib import Path
from typing import Any, assert_type

import fremap
import numpy as np
import numpy.typing as npt


def arrays_have_the_type_that_was_asked_for(window: fremap.Window, slots: fremap.Slots) -> None:
    assert_type(window.array(np.float32), npt.NDArray[np.float32])
    assert_type(window.array(np.dtype(np.int64), (-1, 512)), npt.NDArray[np.int64])
    assert_type(window.array("<f4"), npt.NDArray[Any])
    assert_type(slots.array(np.uint8), npt.NDArray[np.uint8])
    assert_type(window.pages, npt.NDArray[np.uint8])


def rows_are_iterable(rows: fremap.Rows) -> None:
    for row in rows:
        assert_type(row, Any)


def orders_are_named_or_listed(rows: fremap.Rows) -> None:
    rows.batches(4, "sequential")
    rows.batches(4, [3, 1, 2])
    rows.batches(4, range(10))
    rows.batches(4, np.arange(10))
    rows.batches(4, "sequental")  # type: ignore[arg-type]


def what_is_opened_is_known(
    path: Path, system: object, options: dict[str, str] | None, file: Path | tuple[Any, str]
) -> None:
    assert_type(fremap.open(path, "r+"), fremap.FileStore)
    assert_type(fremap.open("file", page_bytes=4096), fremap.FileStore)
    assert_type(fremap.open((system, "bucket/key")), fremap.RemoteStore)
    url = "s3://bucket/key"
    assert_type(fremap.open(url, storage_options={"anon": True}), fremap.RemoteStore)
    assert_type(fremap.open(url, storage_options=options), fremap.FileStore | fremap.RemoteStore)
    assert_type(fremap.open(file), fremap.FileStore | fremap.RemoteStore)
    fremap.load(url)
    fremap.load((system, "bucket/key.npy"))


def modes_and_engines_are_named(store: fremap.Store) -> None:
    fremap.memmap("file", mode="r+")
    fremap.memmap("file", mode="rw")  # type: ignore[arg-type]
    fremap.open("file", "rw")  # type: ignore[call-overload]
    fremap.Window(store, engine="page")  # type: ignore[arg-type]
    fremap.Window(store, fault="signals")  # type: ignore[arg-type]
