"""Rows of unequal length in any files, as slices of one array have them."""

import tempfile
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.any_user


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6).filter(sum),
    element=st.sampled_from(["u1", "<u2", "<f4", "<i8", "V3", "<c16", "V700"]),
    data=st.data(),
)
def test_any_rows(sizes: list[int], element: str, data: Any) -> None:
    item = np.dtype(element)
    sizes = [size * 2 // item.itemsize for size in sizes] if item.itemsize > 8 else sizes
    total = sum(sizes)
    noise = np.random.default_rng(total).bytes(total * item.itemsize)
    values = np.frombuffer(noise, item)
    bounds = sorted(data.draw(st.lists(st.integers(0, total), min_size=1, max_size=40)))
    count = len(bounds) - 1
    ids = data.draw(st.lists(st.integers(-count, count - 1), max_size=60)) if count else []
    offset = data.draw(st.sampled_from([0, 7, 4096]))
    direct = data.draw(st.booleans())
    with tempfile.TemporaryDirectory(prefix="fremap-") as folder:
        paths = []
        for number, end in enumerate(np.cumsum(sizes).tolist()):
            path = Path(folder, str(number))
            path.write_bytes(bytes(offset) + values[end - sizes[number] : end].tobytes())
            paths.append(path)
        with fremap.ragged(paths, bounds, item, offset=offset, direct=direct) as rows:
            for _ in range(2):
                taken = rows.take(ids)
                rows.take(list(range(count)) * 16)  # what is in the page cache is copied next
                expected = [values[bounds[:-1][row] : bounds[1:][row]] for row in ids]
                assert taken.offsets.tolist() == [0, *np.cumsum(list(map(len, expected)))]
                assert taken.values.tobytes() == b"".join(part.tobytes() for part in expected)
