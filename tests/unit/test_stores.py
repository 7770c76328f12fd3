"""Stores as Python sees them: opening, pages in and out, errors, the end."""

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap.testing import failures

Numbered = Callable[..., np.ndarray]
MakeFile = Callable[..., Path]
MakeStore = Callable[[int], fremap.Store]


def test_properties_of_a_file(numbered_file: MakeFile) -> None:
    path = numbered_file(5, tail_bytes=100)
    with fremap.open(path, page_bytes=4096) as store:
        assert (store.page_count, store.page_bytes, store.size) == (6, 4096, 5 * 4096 + 100)
        assert store.path == str(path)
        assert not store.writable
        assert os.fstat(store.fileno()).st_size == store.size
        assert repr(store) == f"<fremap.FileStore '{path}', 6 pages of 4096 bytes>"
    assert store.closed
    assert repr(store) == f"<fremap.FileStore '{path}', closed>"


def test_read_in_any_order_with_repeats(
    numbered_store: MakeStore, numbered_pages: Numbered
) -> None:
    order = [5, 0, 5, 3, 99, 42]
    with numbered_store(100) as store:
        pages = store.read(order)
        assert pages.dtype == np.uint8
        assert pages.shape == (6, 4096)
        np.testing.assert_array_equal(pages, numbered_pages(order))
        np.testing.assert_array_equal(store.read(slice(7, 3, -1)), numbered_pages([7, 6, 5, 4]))
        np.testing.assert_array_equal(store.read(8), numbered_pages([8]))
        np.testing.assert_array_equal(store.read(), numbered_pages(range(100)))
        assert store.read([]).shape == (0, 4096)


def test_read_into_the_callers_memory(numbered_store: MakeStore, numbered_pages: Numbered) -> None:
    with numbered_store(10) as store:
        out = np.zeros((2, 512), dtype=np.uint64)
        filled = store.read([4, 2], out=out)
        assert np.shares_memory(filled, out)
        np.testing.assert_array_equal(out.view(np.uint8), numbered_pages([4, 2]))
        backing = bytearray(4096)
        store.read(9, out=backing)
        assert bytes(backing) == numbered_pages([9]).tobytes()


@pytest.mark.parametrize(
    "out",
    [
        bytes(8192),
        bytearray(8191),
        np.zeros((2, 8192), dtype=np.uint8)[:, ::2],
    ],
    ids=["read-only", "wrong size", "not contiguous"],
)
def test_out_that_cannot_take_the_pages(numbered_store: MakeStore, out: object) -> None:
    with numbered_store(4) as store, pytest.raises(fremap.ArgumentError, match=r"^read: out"):
        store.read([0, 1], out=out)


def test_the_end_of_the_file_reads_as_zeros(
    numbered_file: MakeFile, numbered_pages: Numbered
) -> None:
    with fremap.open(numbered_file(2, tail_bytes=10), page_bytes=4096) as store:
        tail = store.read(2)[0]
        assert bytes(tail[:10]) == numbered_pages([2]).tobytes()[:10]
        assert not tail[10:].any()


@pytest.mark.parametrize("page_bytes", [4096, 65536, 2 << 20])
def test_larger_pages(numbered_file: MakeFile, page_bytes: int, numbered_pages: Numbered) -> None:
    path = numbered_file(3, page_bytes, tail_bytes=5000)
    with fremap.open(path, page_bytes=page_bytes) as store:
        assert store.page_count == 4
        np.testing.assert_array_equal(store.read([2, 0]), numbered_pages([2, 0], page_bytes))
        assert len(store.resident()) == 4


def test_write_then_read(numbered_store: MakeStore, numbered_pages: Numbered) -> None:
    with numbered_store(10) as store:
        store.write([7, 1], numbered_pages([100, 101]))
        store.write(slice(3, 5), numbered_pages([103, 104]).view(np.float64))
        expected = [0, 101, 2, 103, 104, 5, 6, 100, 8, 9]
        np.testing.assert_array_equal(store.read(), numbered_pages(expected))
        store.sync()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("page_bytes", [4096, 64 << 10, 2 << 20])
def test_pages_are_written_in_any_order_and_in_runs(
    page_bytes: int, direct: bool, tmp_path: Path, numbered_pages: Numbered
) -> None:
    size = 7 * page_bytes + 4096 + 33
    pages = [7, 0, 1, 2, 3, 6, 5, 4]
    path = tmp_path / "new"
    with fremap.open(path, "w+", size=size, page_bytes=page_bytes, direct=direct) as store:
        store.write(pages, numbered_pages(pages, page_bytes))
        store.sync()
        expected = numbered_pages(pages, page_bytes)
        expected[0, 4096 + 33 :] = 0
        np.testing.assert_array_equal(store.read(pages), expected)
        # The last of two writes to a page stays.
        store.write([2, 2, 2], numbered_pages([8, 9, 10], page_bytes))
        np.testing.assert_array_equal(store.read(2), numbered_pages([10], page_bytes))
    assert path.stat().st_size == size


def test_more_is_written_at_once_than_a_buffer_holds(
    numbered_file: MakeFile, numbered_pages: Numbered
) -> None:
    with fremap.open(numbered_file(1000), "r+", page_bytes=4096) as store:
        store.write(None, numbered_pages(range(1, 1001)))
        np.testing.assert_array_equal(store.read(), numbered_pages(range(1, 1001)))


def test_a_file_that_was_cut_is_not_made_longer(
    numbered_file: MakeFile, numbered_pages: Numbered
) -> None:
    path = numbered_file(10)
    with fremap.open(path, "r+", page_bytes=4096) as store:
        os.truncate(path, 4 * 4096 + 10)
        for pages, missing, completed in [([0, 4, 5, 1], 5, 2), ([9], 9, 0)]:
            with pytest.raises(fremap.TruncatedError) as raised:
                store.write(pages, numbered_pages(pages))
            assert (raised.value.file_page, raised.value.completed) == (missing, completed)
    assert path.stat().st_size == 4 * 4096 + 10


def test_a_file_that_grew_keeps_what_is_behind_the_old_end(numbered_file: MakeFile) -> None:
    path = numbered_file(1, tail_bytes=100)
    with fremap.open(path, "r+", page_bytes=4096) as store:
        os.truncate(path, 2 * 4096)
        store.write(1, b"x" * 4096)
    assert path.read_bytes()[4096:] == b"x" * 100 + bytes(3996)


def test_writes_are_seen_through_the_map_that_cached_pages_are_copied_from(
    numbered_store: MakeStore, numbered_pages: Numbered
) -> None:
    with numbered_store(600) as store:
        scattered = np.random.default_rng(3).integers(0, 600, 2000)
        for _ in range(3):
            np.testing.assert_array_equal(store.read(scattered), numbered_pages(scattered))
        store.write(77, numbered_pages([1000]))
        np.testing.assert_array_equal(store.read([77, 77]), numbered_pages([1000, 1000]))


def test_writing_never_makes_the_file_longer(numbered_file: MakeFile) -> None:
    path = numbered_file(2, tail_bytes=10)
    with fremap.open(path, "r+", page_bytes=4096) as store:
        store.write(2, b"x" * 4096)
    assert path.stat().st_size == 2 * 4096 + 10
    assert path.read_bytes()[-10:] == b"x" * 10


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"short", fremap.ArgumentError),
        (np.array([None] * 512), fremap.ArgumentTypeError),
        ("text", fremap.ArgumentTypeError),
        ([1, 2, 3], fremap.ArgumentTypeError),
    ],
)
def test_data_that_is_no_page(
    numbered_store: MakeStore, data: object, error: type[Exception]
) -> None:
    with numbered_store(4) as store, pytest.raises(error, match=r"^write: data"):
        store.write(0, data)


def test_write_to_a_read_only_store(numbered_file: MakeFile) -> None:
    with fremap.open(numbered_file(2)) as store, pytest.raises(fremap.UnsupportedError):
        store.write(0, bytes(store.page_bytes))


def test_create_truncates_and_sizes(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_bytes(b"old content")
    with fremap.open(path, "w+", size=10_000, page_bytes=4096) as store:
        assert (store.page_count, store.size, store.writable) == (3, 10_000, True)
        assert not store.read().any()
    assert path.stat().st_size == 10_000


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_paths_of_every_kind(numbered_file: MakeFile, kind: Callable[[Path], object]) -> None:
    path = numbered_file(1)
    with fremap.open(kind(path)) as store:
        assert os.fspath(store.path) == (os.fsencode(path) if kind is os.fsencode else str(path))


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    with pytest.raises(FileNotFoundError) as raised:
        fremap.open(path)
    assert os.fsencode(raised.value.filename) == path


def test_by_descriptor(numbered_file: MakeFile, numbered_pages: Numbered) -> None:
    with numbered_file(3).open("rb") as file:
        store = fremap.open(file.fileno(), page_bytes=4096)
    # The store has a descriptor of its own.
    with store:
        assert store.path is None
        np.testing.assert_array_equal(store.read(2), numbered_pages([2]))


@pytest.mark.parametrize(
    ("flags", "mode", "error"),
    [
        (os.O_RDONLY, "r+", fremap.StoreError),
        (os.O_WRONLY, "r", fremap.StoreError),
        (os.O_RDWR | os.O_APPEND, "r+", fremap.ArgumentError),
    ],
)
def test_a_descriptor_that_was_opened_for_something_else(
    flags: int, mode: str, error: type[Exception], numbered_file: MakeFile
) -> None:
    descriptor = os.open(numbered_file(1), flags)
    try:
        with pytest.raises(error):
            fremap.open(descriptor, mode)
    finally:
        os.close(descriptor)


def test_a_descriptor_past_the_page_cache(
    numbered_file: MakeFile, numbered_pages: Numbered
) -> None:
    with (
        numbered_file(3, tail_bytes=77).open("rb") as file,
        fremap.open(file.fileno(), page_bytes=4096, direct=True) as store,
    ):
        np.testing.assert_array_equal(store.read([2, 0]), numbered_pages([2, 0]))


def test_a_descriptor_that_is_not_open() -> None:
    for descriptor in (-1, 1 << 20):
        with pytest.raises(fremap.StoreError) as raised:
            fremap.open(descriptor)
        assert raised.value.errno == errno.EBADF


def test_open_errors_are_those_of_open(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as raised:
        fremap.open(missing)
    assert isinstance(raised.value, fremap.StoreError)
    assert raised.value.errno == errno.ENOENT
    assert raised.value.filename == str(missing)
    assert raised.value.completed == 0
    for mode in ("r", "r+"):
        with pytest.raises(IsADirectoryError):
            fremap.open(tmp_path, mode)


@pytest.mark.parametrize("call", ["open", "stat"])
def test_what_the_kernel_refuses_names_the_file(call: str, numbered_file: MakeFile) -> None:
    path = numbered_file(1)
    with (
        failures(call, errno=errno.EMFILE, skip=0, times=1),
        pytest.raises(fremap.StoreError) as raised,
    ):
        fremap.open(path)
    assert (raised.value.errno, raised.value.filename) == (errno.EMFILE, str(path))


def test_what_has_no_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fremap.ArgumentError, match="neither a file nor a block device"):
        fremap.open("/dev/null")
    ends = os.pipe()
    with pytest.raises(fremap.ArgumentError, match="pipe"):
        fremap.open(ends[0])
    for end in ends:
        os.close(end)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(fremap.ArgumentError, match="socket"):
            fremap.open(tmp_path / "socket")


def test_an_empty_file_has_no_page(numbered_file: MakeFile) -> None:
    with fremap.open(numbered_file(0)) as store:
        assert store.page_count == 0
        assert store.read().shape == (0, store.page_bytes)
        assert store.resident().tolist() == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "rb"},
        {"mode": "w+"},
        {"mode": "r", "size": 10},
        {"mode": "w+", "size": -1},
        {"page_bytes": 1000},
        {"page_bytes": 2048},
        {"page_bytes": -4096},
        {"page_bytes": 1 << 31},
        {"page_bytes": 1 << 70},
    ],
)
def test_impossible_arguments(numbered_file: MakeFile, arguments: dict[str, object]) -> None:
    path = numbered_file(1)
    content = path.read_bytes()
    with pytest.raises(fremap.ArgumentError):
        fremap.open(path, **arguments)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, fremap.ArgumentError),
        ({"size": 4096, "create": False}, fremap.ArgumentError),
        ({"size": 4096, "name": "a/b"}, fremap.ArgumentError),
        ({"size": 4096, "name": ""}, fremap.ArgumentError),
        ({"size": 4096, "name": "x", "create": False}, fremap.ArgumentError),
        ({"size": True}, fremap.ArgumentTypeError),
        ({"size": 1.5}, fremap.ArgumentTypeError),
        ({"name": "fremap-nobody-made-this", "create": False}, FileNotFoundError),
    ],
)
def test_impossible_memory(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        fremap.MemoryStore(**arguments)


def test_named_memory(shared_name: str, numbered_pages: Numbered) -> None:
    with fremap.MemoryStore(2 * 4096, name=shared_name, page_bytes=4096) as store:
        store.write(1, numbered_pages([1]))
        with pytest.raises(FileExistsError):
            fremap.MemoryStore(4096, name=shared_name)
        with fremap.MemoryStore(name=shared_name, create=False, page_bytes=4096) as other:
            assert other.name == shared_name
            assert other.page_count == 2
            np.testing.assert_array_equal(other.read(1), numbered_pages([1]))
            other.unlink()
        with pytest.raises(FileNotFoundError):
            store.unlink()
        np.testing.assert_array_equal(store.read(1), numbered_pages([1]))


def test_anonymous_memory_has_no_name() -> None:
    with fremap.MemoryStore(100) as store:
        assert store.name is None
        with pytest.raises(fremap.ArgumentError):
            store.unlink()


def test_resident_and_prefetch(numbered_file: MakeFile) -> None:
    path = numbered_file(64)
    with fremap.open(path, page_bytes=4096) as store:
        os.fsync(store.fileno())
        os.posix_fadvise(store.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not store.resident().any()
        assert store.resident([3, 3]).tolist() == [False, False]
        store.read(range(64))
        assert store.resident().all()
        store.prefetch([1, 63])
        store.prefetch(None)


def test_truncation_is_an_exception(numbered_file: MakeFile) -> None:
    path = numbered_file(8)
    with fremap.open(path, page_bytes=4096) as store:
        os.truncate(path, 4 * 4096)
        with pytest.raises(fremap.TruncatedError, match="refresh") as raised:
            store.read(range(8))
        assert raised.value.errno == errno.ENODATA
        assert raised.value.filename == str(path)
        assert raised.value.completed <= 4
        assert raised.value.file_page == 4
        store.refresh()
        assert store.page_count == 4
        assert store.read().shape == (4, 4096)


def test_growth_is_seen_after_refresh(numbered_file: MakeFile) -> None:
    path = numbered_file(2)
    with fremap.open(path, page_bytes=4096) as store:
        os.truncate(path, 5 * 4096)
        assert store.page_count == 2
        with pytest.raises(fremap.PageRangeError):
            store.read(4)
        store.refresh()
        assert store.page_count == 5


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.read(0),
        lambda store: store.write(0, bytes(4096)),
        lambda store: store.resident(),
        lambda store: store.prefetch(0),
        lambda store: store.sync(),
        lambda store: store.refresh(),
        lambda store: store.fileno(),
    ],
    ids=["read", "write", "resident", "prefetch", "sync", "refresh", "fileno"],
)
def test_closed(numbered_store: MakeStore, call: Callable[[fremap.Store], object]) -> None:
    store = numbered_store(2)
    store.close()
    store.close()
    with pytest.raises(fremap.ClosedError, match="the store is closed"):
        call(store)


def test_ids_are_copied_first(numbered_store: MakeStore, numbered_pages: Numbered) -> None:
    """The ids may lie where the pages go."""
    with numbered_store(600) as store:
        memory = np.zeros(512 * 512, dtype=np.int64)
        ids = memory[:512]
        ids[:] = np.arange(512)[::-1] + 5
        expected = numbered_pages(ids.copy())
        store.read(ids, out=memory)
        np.testing.assert_array_equal(memory.view(np.uint8).reshape(512, 4096), expected)


def test_many_threads_read_at_once(numbered_store: MakeStore, numbered_pages: Numbered) -> None:
    failures: list[BaseException] = []
    with numbered_store(500) as store:

        def read(seed: int) -> None:
            try:
                for _ in range(5):
                    order = np.random.default_rng(seed).integers(0, 500, 300)
                    np.testing.assert_array_equal(store.read(order), numbered_pages(order))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_store_is_not_made_by_itself() -> None:
    with pytest.raises(TypeError, match=r"fremap\.open"):
        fremap.Store()
