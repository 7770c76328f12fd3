"""`fremap.memmap` beside `numpy.memmap`: the same file, the same index, the same stores."""

from __future__ import annotations

import tempfile
from typing import Any

import fremap
import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays

DTYPES = ["u1", "<i2", ">i4", "<f4", "c16", "?", "S3", "M8[s]", [("a", "<i2"), ("b", "f8", (2,))]]
TAIL_BYTES = 11

layouts = some.fixed_dictionaries(
    {
        "dtype": some.sampled_from(DTYPES).map(np.dtype),
        "offset": some.sampled_from([0, 1, 8, 4095, 4096, 5000, 20_000]),
        "shape": arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40),
        "order": some.sampled_from(["C", "F"]),
    }
)


def filled_file(layout: dict[str, Any], seed: int) -> Any:
    """A file with noise before, in and after the array."""
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - the caller's
    size = layout["offset"] + int(np.prod(layout["shape"])) * layout["dtype"].itemsize + TAIL_BYTES
    # Small enough that a float of any kind is a number.
    noise = np.random.default_rng(seed).integers(0, 2, size, dtype=np.uint8)
    file.write(noise.tobytes())
    file.flush()
    return file


def both(file: Any, layout: dict[str, Any], mode: str) -> tuple[np.memmap, fremap.memmap]:
    return np.memmap(file.name, mode=mode, **layout), fremap.memmap(file.name, mode=mode, **layout)


@some.composite
def indices(draw: some.DrawFn, shape: tuple[int, ...]) -> Any:
    """What an array of this shape may be indexed by."""
    kinds = [arrays.basic_indices(shape, allow_newaxis=True)]
    if len(shape) and shape[0]:
        numbers = some.integers(-shape[0], shape[0] - 1)
        kinds += [
            some.lists(numbers, max_size=60),
            arrays.arrays(np.int16, some.integers(0, 60), elements=numbers),
            arrays.arrays(
                np.int64, some.tuples(some.just(7), some.integers(0, 5)), elements=numbers
            ),
            arrays.arrays(np.bool_, shape[0]),
            arrays.arrays(np.bool_, shape),
        ]
        if all(shape):
            kinds.append(arrays.integer_array_indices(shape))
    return draw(some.one_of(kinds))


@given(data=some.data(), layout=layouts, mode=some.sampled_from(["r", "r+", "c"]))
def test_reads_alike(data: some.DataObject, layout: dict[str, Any], mode: str) -> None:
    with filled_file(layout, 1) as file:
        theirs, ours = both(file, layout, mode)
        np.testing.assert_array_equal(ours, theirs)
        assert (ours.dtype, ours.shape, ours.strides) == (
            theirs.dtype, theirs.shape, theirs.strides,
        )  # fmt: skip
        assert ours.flags.writeable == theirs.flags.writeable
        index = data.draw(indices(ours.shape))
        here, there = ours[index], theirs[index]
        np.testing.assert_array_equal(np.asarray(here), np.asarray(there))
        assert np.shape(here) == np.shape(there)
        assert isinstance(here, np.memmap) == isinstance(there, np.memmap)


@given(data=some.data(), layout=layouts, mode=some.sampled_from(["r+", "w+"]))
def test_stores_alike(data: some.DataObject, layout: dict[str, Any], mode: str) -> None:
    with filled_file(layout, 2) as one, filled_file(layout, 2) as other:
        theirs = np.memmap(one.name, mode=mode, **layout)
        ours = fremap.memmap(other.name, mode=mode, **layout)
        for number in range(data.draw(some.integers(1, 4))):
            index = data.draw(indices(ours.shape))
            value = np.full(layout["dtype"].itemsize, number % 2, np.uint8).view(layout["dtype"])
            theirs[index] = value[0]
            ours[index] = value[0]
            np.testing.assert_array_equal(ours, theirs)
        theirs.flush()
        ours.flush()
        with open(one.name, "rb") as first, open(other.name, "rb") as second:
            assert second.read() == first.read()


@given(layout=layouts)
def test_a_file_that_either_made_is_read_by_the_other(layout: dict[str, Any]) -> None:
    memmaps = (np.memmap, fremap.memmap)
    for writer, reader in (memmaps, memmaps[::-1]):
        with tempfile.NamedTemporaryFile() as file:
            made = writer(file.name, mode="w+", **layout)
            made.view(np.ndarray)[...] = np.ones((), layout["dtype"])
            expected = made.copy()
            made.flush()
            del made
            np.testing.assert_array_equal(reader(file.name, mode="r", **layout), expected)


@given(
    bytes_there=some.integers(0, 9000),
    dtype=some.sampled_from(DTYPES).map(np.dtype),
    mode=some.sampled_from(["r", "r+", "c"]),
    options=some.fixed_dictionaries(
        {"offset": some.integers(0, 9000)},
        optional={"shape": arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=200)},
    ),
)
@example(bytes_there=0, dtype=np.dtype("u1"), mode="r+", options={"offset": 2})
def test_what_can_be_mapped_is_the_same(
    bytes_there: int, dtype: np.dtype[Any], mode: str, options: dict[str, Any]
) -> None:
    # NumPy's -1 elements of one byte are an empty array, for which it makes the file longer.
    assume("shape" in options or (bytes_there, options["offset"]) != (0, 1))
    results: list[Any] = []
    for memmap in (np.memmap, fremap.memmap):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"\1" * bytes_there)
            file.flush()
            try:
                array = memmap(file.name, dtype, mode, **options)
                results.append((array.shape, array.tobytes()))
                del array
            except (ValueError, OverflowError, TypeError):
                results.append("refused")
            file.seek(0, 2)
            results.append(file.tell())
    theirs, ours = results[:2], results[2:]
    if theirs[0] == "refused":
        # NumPy makes an empty file longer before it refuses it.
        theirs = ["refused", bytes_there]
    assert ours == theirs


@given(data=some.data(), shape=arrays.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=99))
def test_pickled_views_are_the_views(data: some.DataObject, shape: tuple[int, ...]) -> None:
    import pickle

    layout = {"dtype": np.dtype("<i8"), "offset": 40, "shape": shape, "order": "C"}
    with filled_file(layout, 3) as file:
        array = fremap.memmap(file.name, mode="r", **layout)
        view = array[data.draw(arrays.basic_indices(shape, allow_newaxis=True))]
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(view)), view)
