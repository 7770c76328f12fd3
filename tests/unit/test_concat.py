"""Stores in a row: what goes in, which file a page is read from and written to, and the end."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import failures, numbered_page, numbered_words, page_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.any_user

COUNTS = (3, 5, 0, 1, 7)
TOTAL = sum(COUNTS)
STARTS = np.cumsum([0, *COUNTS[:-1]]).tolist()


@pytest.fixture
def make_files(tmp_path: Path) -> Callable[..., list[Path]]:
    """`make_files(counts)`: files of so many pages, numbered through from the first."""

    def make(counts: Sequence[int], page_bytes: int = 4096) -> list[Path]:
        paths, first = [], 0
        for number, count in enumerate(counts):
            path = tmp_path / f"part{number}"
            path.write_bytes(numbered_words(range(first, first + count), page_bytes).tobytes())
            paths.append(path)
            first += count
        return paths

    return make


@pytest.fixture
def paths(make_files: Callable[..., list[Path]]) -> list[Path]:
    return make_files(COUNTS)


@pytest.fixture
def row(paths: list[Path]) -> Iterator[fremap.ConcatStore]:
    with fremap.concat(fremap.open(path, "r+", page_bytes=4096) for path in paths) as store:
        yield store


def shown(window: fremap.Window) -> list[int]:
    words = page_numbers(window.array(np.uint64, (window.page_count, -1)))
    assert (words == words[:, :1]).all()
    return words[:, 0].tolist()


def test_what_a_row_is(row: fremap.ConcatStore) -> None:
    assert (row.page_count, row.page_bytes, row.size) == (TOTAL, 4096, TOTAL * 4096)
    assert row.writable
    assert len(row.stores) == len(COUNTS)
    assert repr(row) == "<fremap.ConcatStore of 5 stores, 16 pages of 4096 bytes, writable>"
    with pytest.raises(fremap.UnsupportedError, match="ask the stores"):
        row.fileno()


def test_pages_are_read_from_and_written_to_their_files(
    row: fremap.ConcatStore, paths: list[Path]
) -> None:
    assert row.read(None).tobytes() == numbered_words(range(TOTAL)).tobytes()
    assert page_numbers(row.read([15, 2, 3, 8, 7, 3]).view(np.uint64))[:, 0].tolist() == [
        15, 2, 3, 8, 7, 3,
    ]  # fmt: skip
    row.write([2, 3, 9], numbered_words([102, 103, 109]).view(np.uint8))
    row.sync()
    row.prefetch(None)
    assert paths[0].read_bytes()[2 * 4096 :] == numbered_page(102)
    assert paths[1].read_bytes()[:4096] == numbered_page(103)
    assert paths[4].read_bytes()[:4096] == numbered_page(109)
    assert row.resident([2, 3, 9]).all()


def test_a_window_across_files(engine: str, row: fremap.ConcatStore) -> None:
    order = [15, 14, 2, 3, 4, 8, 9, 0, 7, 8]
    with fremap.Window(row, engine=engine, populate=True) as window:
        assert shown(window) == list(range(TOTAL))
        window.remap(order, at=3)
        assert shown(window) == [0, 1, 2, *order, 13, 14, 15]
        assert window.remap([3, 2], nonblock=True).all()
        assert shown(window)[:2] == [3, 2]


def test_alias_maps_each_file_once(row: fremap.ConcatStore) -> None:
    before = mappings()
    with fremap.Window(row, engine="alias"):
        files = sum(count > 0 for count in COUNTS)
        assert mappings() - before == files


def mappings() -> int:
    with open("/proc/self/maps") as lines:
        return sum("/part" in line for line in lines)


def test_changes_go_to_the_right_file(
    write_back: dict[str, Any], row: fremap.ConcatStore, paths: list[Path]
) -> None:
    changed = [1, 2, 3, 7, 8, 9, 15]
    with fremap.Window(row, populate=True, **write_back) as window:
        words = window.array(np.uint64, (TOTAL, -1))
        words[changed] = numbered_words(changed, generation=1)
        assert np.flatnonzero(window.dirty()).tolist() == changed
        window.flush()
        del words
    expected = numbered_words(range(TOTAL))
    expected[changed] = numbered_words(changed, generation=1)
    assert b"".join(path.read_bytes() for path in paths) == expected.tobytes()


def test_a_coherent_window_writes_the_files(row: fremap.ConcatStore, paths: list[Path]) -> None:
    with fremap.Window(row, engine="alias", prot=Prot.WRITE, coherent=True) as window:
        window.pages[[2, 3]] = numbered_words([102, 103]).view(np.uint8)
        assert paths[0].read_bytes()[2 * 4096 :] == numbered_page(102)
        assert paths[1].read_bytes()[:4096] == numbered_page(103)
        window.flush()


@pytest.mark.needs("paged")
def test_source_maps_of_all_files_keep_to_the_budget(make_files: Callable[..., Any]) -> None:
    """24 files of 1 MiB, all of them warm: no more of them is mapped than an eighth of 12 MiB."""
    counts = [256] * 24
    stores = [fremap.open(path, page_bytes=4096) for path in make_files(counts)]
    random = np.random.default_rng(3)
    with (
        fremap.concat(stores) as row,
        fremap.Window(row, engine="paged", budget=12 << 20) as window,
    ):
        before = mapped_kib()
        for _ in range(8):
            some = random.permutation(row.page_count)[:1500]
            window.remap(some)
            assert shown_front(window, len(some)) == some.tolist()
            assert mapped_kib() - before <= 1536
            assert window.stats().present_pages * 4096 <= 12 << 20


def mapped_kib() -> int:
    with open("/proc/self/smaps") as lines:
        fields = [line.split() for line in lines]
    own = False
    total = 0
    for field in fields:
        if "-" in field[0]:
            own = field[-1].rpartition("/")[2].startswith("part")
        total += int(field[1]) if own and field[0] == "Rss:" else 0
    return total


def shown_front(window: fremap.Window, count: int) -> list[int]:
    return page_numbers(window.array(np.uint64, (count, 512))[:, 0]).tolist()


@pytest.mark.slow
def test_a_thousand_files(engine: str, make_files: Callable[..., list[Path]]) -> None:
    count = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * count)), hard))
    try:
        files = make_files([2] * count)
        order = np.random.default_rng(4).permutation(2 * count)
        with (
            fremap.concat(fremap.open(path, page_bytes=4096) for path in files) as row,
            fremap.Window(row, engine=engine) as window,
        ):
            window.remap(order)
            assert shown(window) == order.tolist()
            assert page_numbers(row.read(order).view(np.uint64))[:, 7].tolist() == order.tolist()
            assert len(row.resident()) == 2 * count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# What is refused.


def test_no_stores() -> None:
    with pytest.raises(fremap.ArgumentError, match="at least one"):
        fremap.concat([])
    with pytest.raises(fremap.ArgumentTypeError, match="not str"):
        fremap.concat(["table.bin"])  # type: ignore[list-item]


def test_pages_of_two_sizes(paths: list[Path]) -> None:
    stores = [fremap.open(paths[0], page_bytes=4096), fremap.open(paths[1], page_bytes=8192)]
    with pytest.raises(fremap.ArgumentError, match=rf"{paths[0]}.*4096.*{paths[1]}.*8192"):
        fremap.concat(stores)


def test_a_file_that_ends_within_a_page(paths: list[Path]) -> None:
    os.truncate(paths[1], 5000)
    stores = [fremap.open(path, page_bytes=4096) for path in paths[:2]]
    with fremap.concat(stores) as row:
        assert row.size == 3 * 4096 + 5000
        assert not row.read(4)[0, 904:].any()
        with pytest.raises(fremap.ArgumentError, match=rf"{paths[1]} ends.*fremap\.rows"):
            fremap.concat([row, fremap.open(paths[4], page_bytes=4096)])


def test_npy_files(tmp_path: Path) -> None:
    stores = []
    for name in ("one.npy", "two.npy"):
        np.save(tmp_path / name, np.zeros(4096 - 128, np.uint8))
        stores.append(fremap.open(tmp_path / name, page_bytes=4096))
    with pytest.raises(fremap.ArgumentError, match=r"one\.npy .*byte 128.*fremap\.rows"):
        fremap.concat(stores)


def test_an_element_in_two_files(engine: str, row: fremap.ConcatStore, paths: list[Path]) -> None:
    with fremap.Window(row, engine=engine, populate=True) as window:
        with pytest.raises(fremap.ArgumentError, match=rf"{paths[0]}.*{paths[1]}.*fremap\.rows"):
            window.array("S20")
        assert window.array("S20", shape=2).shape == (2,)  # all of it in the first file
        assert window.array("S12288", shape=2).shape == (2,)
        window.remap([4, 5, 6, 7, 8], at=0)
        with pytest.raises(fremap.ArgumentError, match=rf"{paths[1]}.*{paths[3]}.*byte 16384"):
            window.array("S12", shape=5 * 4096 // 12)


def test_a_file_twice(paths: list[Path]) -> None:
    read = [fremap.open(paths[0], page_bytes=4096) for _ in range(2)]
    with fremap.concat(read) as row, fremap.Window(row, engine="eager", populate=True) as window:
        assert shown(window) == [0, 1, 2, 0, 1, 2]
    with pytest.raises(fremap.ArgumentError, match=rf"{paths[0]} is there twice.*0 and 1"):
        fremap.concat([read[0], fremap.open(paths[0], "r+", page_bytes=4096)])


def test_one_that_may_only_be_read(paths: list[Path]) -> None:
    stores = [
        fremap.open(path, mode, page_bytes=4096)
        for path, mode in zip(paths, ["r+", "r"], strict=False)
    ]
    with fremap.concat(stores) as row:
        assert not row.writable
        with pytest.raises(fremap.UnsupportedError, match=str(paths[1])):
            row.write(0, bytes(4096))
        with pytest.raises(PermissionError) as caught:
            fremap.Window(row, prot=Prot.WRITE, coherent=True)
        assert caught.value.filename == str(paths[1])


# Files that change, and the end.


@pytest.mark.parametrize("warm", [False, True])
def test_one_file_is_cut(
    engine: str, row: fremap.ConcatStore, paths: list[Path], warm: bool
) -> None:
    order = [15, 0, 3, 4, 7, 8]
    with fremap.Window(row, engine=engine) as window:
        if warm:
            window.populate()
            row.read(None)
        os.truncate(paths[1], 4096)
        for call in (
            lambda: row.read(order),
            lambda: window.remap(order),
            lambda: row.write(order, bytes(6 * 4096)),
        ):
            with pytest.raises(fremap.TruncatedError) as caught:
                call()
            assert caught.value.filename == str(paths[1])
            assert caught.value.completed <= 3
        with pytest.raises(fremap.ArgumentError, match=rf"{paths[1]} had 20480.*4096 now"):
            row.refresh()
        assert row.page_count == TOTAL


def test_only_the_last_may_grow(row: fremap.ConcatStore, paths: list[Path]) -> None:
    os.truncate(paths[-1], 8 * 4096)
    row.stores[-1].refresh()
    assert row.page_count == TOTAL
    row.refresh()
    assert row.page_count == TOTAL + 1
    assert not row.read(TOTAL).any()


def test_closing(row: fremap.ConcatStore, paths: list[Path]) -> None:
    with fremap.Window(row, engine="eager", populate=True) as window:
        row.stores[1].close()
        for call in (lambda: row.read(0), row.sync, row.resident, lambda: fremap.Window(row)):
            with pytest.raises(
                fremap.ClosedError, match=rf"store 1 of the ConcatStore \({paths[1]}\) is"
            ):
                call()
        with pytest.raises(fremap.ClosedError):
            fremap.concat(row.stores)
        window.remap([7, 6])  # windows go on
        assert shown(window)[:2] == [7, 6]
    row.close()
    assert row.closed
    assert not row.stores[0].closed
    assert row.stores[0].read(1).tobytes() == numbered_page(1)


def test_files_stay_open_without_their_stores(paths: list[Path]) -> None:
    row = fremap.concat([fremap.open(paths[0]), fremap.concat([fremap.open(paths[1])])])
    with fremap.Window(row, engine="alias") as window:
        del row
        assert shown(window) == list(range(8))


def test_rows_of_rows(paths: list[Path]) -> None:
    opened = [fremap.open(path, page_bytes=4096) for path in paths]
    inner = fremap.concat(opened[1:3])
    with fremap.concat([opened[0], inner, *opened[3:]]) as row:
        assert row.read(None).tobytes() == numbered_words(range(TOTAL)).tobytes()
        opened[2].close()
        with pytest.raises(
            fremap.ClosedError, match=r"store 1 of the ConcatStore \(a ConcatStore of 2 files"
        ):
            row.read(0)


def test_pickle_opens_again(row: fremap.ConcatStore) -> None:
    with pickle.loads(pickle.dumps(row)) as other:
        assert other.stores[0].fileno() != row.stores[0].fileno()
        assert other.read(None).tobytes() == numbered_words(range(TOTAL)).tobytes()
    with copy.copy(row) as other:
        assert other.page_count == TOTAL
    row.close()
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(row)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_other_processes(method: str, paths: list[Path]) -> None:
    """Files by their paths, memory by its descriptor; a child of fork has its parent's."""
    script = f"""
import multiprocessing, sys
import fremap
def child(row, queue):
    queue.put(bytes(row.read([2, 3, 7, 8])[:, 0]))
    row.write(8, b"c" * 4096)
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    memory = fremap.MemoryStore(4096, page_bytes=4096)
    memory.write(0, b"m" * 4096)
    files = [fremap.open(path, "r+", page_bytes=4096) for path in sys.argv[1:3]]
    row = fremap.concat([*files, memory])
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(row, queue))
    process.start()
    print(queue.get()[3:], memory.read(0)[0, 0] if process.join() is None else 0)
"""
    path = paths[0].with_name("script.py")
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, path, *map(str, paths[:2])], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "b'm' 99\n"), done.stderr


# Devices that fail.


@pytest.mark.parametrize(("call", "part"), [("write", 1), ("fsync", 3)])
def test_one_file_cannot_be_written(
    write_back: dict[str, Any], row: fremap.ConcatStore, paths: list[Path], call: str, part: int
) -> None:
    """The error names it, what was stored stays dirty, and the next flush writes it."""
    changed = [1, 2, 3, 7, 8, 9, 15]
    with fremap.Window(row, populate=True, **write_back) as window:
        words = window.array(np.uint64, (TOTAL, -1))
        words[changed] = numbered_words(changed, generation=1)
        window.dirty()
        with (
            failures(call, errno=errno.EIO, skip=part),
            pytest.raises(fremap.StoreError) as caught,
        ):
            window.flush()
        assert (caught.value.filename, caught.value.errno) == (str(paths[part]), errno.EIO)
        if call == "write":
            assert window.dirty()[[3, 7, 8, 9, 15]].all()
        assert (page_numbers(words[:, 0]) == np.arange(TOTAL)).all()
        window.flush()
        del words
    expected = numbered_words(range(TOTAL))
    expected[changed] = numbered_words(changed, generation=1)
    assert b"".join(path.read_bytes() for path in paths) == expected.tobytes()
