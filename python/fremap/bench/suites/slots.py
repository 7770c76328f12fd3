"""Slots for extents that are named by Zipf, beside copies into slots and the page cache alone.

Each access reads a word of each page of its extent, so that faults count, and the sum
says whether it was the right one.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import containers
from fremap.bench.bench import Bench
from fremap.bench.competitors import POOL_THREADS, advised_memmap
from fremap.bench.datafile import PAGE_BYTES, DataFile
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    paired,
    timed,
    times_faster,
    times_the_time,
)

_EXTENT_BYTES = (64 << 10, 256 << 10, 2 << 20)
#: Of the file the slots hold one part of so many.
_SLOTS_PART = 4
_MOST_SLOT_BYTES = 512 << 20
_ROUND_BYTES = 256 << 20
_BATCH = 16
_WORDS = PAGE_BYTES // 8

_HITS = 5_000
_PROCESSES = 4

_OWN = "fremap.Slots of one process"
_SHARED = "fremap.Slots(shared=)"
_AUTO = "fremap.Slots"
_COPIED = "fremap.Slots, copied"
_PREAD = "preadv into slots, OrderedDict"
_FADVISE = "preadv into slots after posix_fadvise, OrderedDict"
_POOL = f"preadv into slots by {POOL_THREADS} threads, OrderedDict"
_MEMMAP = "np.memmap copied into slots, OrderedDict"
_HDF5 = "h5py read_direct into slots, OrderedDict"
_MMAP = "np.memmap slices, no slots"
_MMAP_RANDOM = "np.memmap slices, MADV_RANDOM, no slots"

_OTHERS = (_COPIED, _PREAD, _FADVISE, _POOL, _MEMMAP, _HDF5, _MMAP, _MMAP_RANDOM)

Keys: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.int64]


class _Side(Protocol):
    """Something that has extents."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def read(self, keys: Keys) -> int:
        """Return the sum of a word of each page of these extents."""

    @property
    def hit_ratio(self) -> float | None:
        """Part of the accesses whose extent was in a slot."""


class _SlotsSide:
    """`fremap.Slots`."""

    def __init__(self, file: DataFile, extent_bytes: int, slots: int, engine: str) -> None:
        self._stack = ExitStack()
        store = self._stack.enter_context(fremap.open(file.path))
        self.slots = self._stack.enter_context(
            fremap.Slots(store, extent_bytes // PAGE_BYTES, slots, engine=engine)  # type: ignore[arg-type]
        )
        self._words: Words = self.slots.array(np.int64, (-1, _WORDS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._words
        self._stack.close()

    def read(self, keys: Keys) -> int:
        return sum(int(self._words[slot, :, 0].sum()) for slot in self.slots.ensure(keys).tolist())

    @property
    def hit_ratio(self) -> float | None:
        stats = self.slots.stats()
        return stats.hits / (stats.hits + stats.misses)


class _CopyingSide:
    """Extents copied one by one into an array, the one that was wanted least lately leaves."""

    def __init__(self, file: DataFile, extent_bytes: int, slots: int) -> None:
        self._fd = file.fd
        self._extent_bytes = extent_bytes
        self._memory = np.zeros((slots, extent_bytes // 8), np.int64)
        self._words = self._memory.reshape(slots, -1, _WORDS)
        self._free = list(range(slots))
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._hits = self._misses = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._memory, self._words

    def _slot(self, key: int) -> int:
        slot = self._slots.get(key)
        if slot is not None:
            self._hits += 1
            self._slots.move_to_end(key)
            return slot
        self._misses += 1
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        self.bring(key, self._memory[slot])
        self._slots[key] = slot
        return slot

    def bring(self, key: int, into: Words) -> None:
        """Read an extent."""
        offset, view = key * self._extent_bytes, memoryview(into).cast("B")
        while view:
            count = os.preadv(self._fd, [view], offset)
            view, offset = view[count:], offset + count

    def read(self, keys: Keys) -> int:
        return sum(int(self._words[self._slot(key), :, 0].sum()) for key in keys.tolist())

    @property
    def hit_ratio(self) -> float | None:
        return self._hits / (self._hits + self._misses)


class _AdvisingSide(_CopyingSide):
    """The same, but that the kernel is told of all that a batch misses before the first is read."""

    def read(self, keys: Keys) -> int:
        for key in dict.fromkeys(keys.tolist()):
            if key not in self._slots:
                offset = key * self._extent_bytes
                os.posix_fadvise(self._fd, offset, self._extent_bytes, os.POSIX_FADV_WILLNEED)
        return super().read(keys)


class _PoolSide(_CopyingSide):
    """The same, but that all that a batch misses is read by a pool of threads."""

    def __init__(self, file: DataFile, extent_bytes: int, slots: int) -> None:
        super().__init__(file, extent_bytes, slots)
        self._pool = ThreadPoolExecutor(POOL_THREADS)
        self._under_way: list[Future[None]] = []

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        super().__exit__(*exception)

    def bring(self, key: int, into: Words) -> None:
        self._under_way.append(self._pool.submit(super().bring, key, into))

    def read(self, keys: Keys) -> int:
        # A batch has no more keys than there are slots: none of them makes another leave.
        slots = [self._slot(key) for key in keys.tolist()]
        for done in self._under_way:
            done.result()
        self._under_way.clear()
        return sum(int(self._words[slot, :, 0].sum()) for slot in slots)


class _Hdf5Side(_CopyingSide):
    """The same, from a dataset of HDF5 that is laid over the file: a row is an extent."""

    def __init__(self, file: DataFile, extent_bytes: int, slots: int) -> None:
        super().__init__(file, extent_bytes, slots)
        self._container = containers.Hdf5(file.path, 0, extent_bytes)

    def __exit__(self, *exception: object) -> None:
        self._container.__exit__(*exception)
        super().__exit__(*exception)

    def bring(self, key: int, into: Words) -> None:
        self._container.read_into(key, into.view(np.uint8))


class _MemmapCopiedSide(_CopyingSide):
    """The same, copied from an `np.memmap`."""

    def __init__(self, file: DataFile, extent_bytes: int, slots: int) -> None:
        super().__init__(file, extent_bytes, slots)
        self._file: Words = np.memmap(file.path, np.int64, mode="r")

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        del self._file  # pages that are mapped cannot be dropped

    def bring(self, key: int, into: Words) -> None:
        into[:] = self._file[key * len(into) : (key + 1) * len(into)]


class _MmapSide:
    """Slices of an `np.memmap`: the page cache has the slots."""

    hit_ratio: float | None = None

    def __init__(self, file: DataFile, extent_bytes: int, advice: int) -> None:
        self._extent_words = extent_bytes // 8
        self._file: Words = advised_memmap(file.path, np.int64, advice)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._file

    def read(self, keys: Keys) -> int:
        size = self._extent_words
        extents = (self._file[key * size : (key + 1) * size] for key in keys.tolist())
        return sum(int(extent[::_WORDS].sum()) for extent in extents)


class _Accesses:
    """Batches of keys: in a random order, the k-th once for k times the first (exponent 1)."""

    def __init__(self, extents: int, extent_bytes: int) -> None:
        self.extent_pages = extent_bytes // PAGE_BYTES
        self.count = max(_BATCH, _ROUND_BYTES // extent_bytes)
        self._ranked = np.random.default_rng(2002).permutation(extents)
        self._shares = np.cumsum(1 / np.arange(1, extents + 1))

    def batches(self, number: int) -> list[Keys]:
        """Draw those of a round."""
        drawn = np.random.default_rng([2002, number]).random(self.count) * self._shares[-1]
        keys: Keys = self._ranked[np.searchsorted(self._shares, drawn)]
        return [keys[first : first + _BATCH] for first in range(0, self.count, _BATCH)]

    def read(self, side: _Side, number: int) -> None:
        """Make the accesses of a round."""
        pages = self.extent_pages
        for keys in self.batches(number):
            # Pages begin with their number.
            expected = int(keys.sum()) * pages * pages + len(keys) * pages * (pages - 1) // 2
            if side.read(keys) != expected:
                raise BenchError("an extent was not the one that was asked for")


def _sides(file: DataFile, extent_bytes: int, slots: int) -> dict[str, Callable[[], _Side]]:
    sides: dict[str, Callable[[], _Side]] = {
        _AUTO: partial(_SlotsSide, file, extent_bytes, slots, "auto"),
        _COPIED: partial(_SlotsSide, file, extent_bytes, slots, "paged"),
        _PREAD: partial(_CopyingSide, file, extent_bytes, slots),
        _FADVISE: partial(_AdvisingSide, file, extent_bytes, slots),
        _POOL: partial(_PoolSide, file, extent_bytes, slots),
        _MEMMAP: partial(_MemmapCopiedSide, file, extent_bytes, slots),
        _MMAP: partial(_MmapSide, file, extent_bytes, mmap.MADV_NORMAL),
        _MMAP_RANDOM: partial(_MmapSide, file, extent_bytes, mmap.MADV_RANDOM),
    }
    if containers.Hdf5.unavailable() is None:
        sides[_HDF5] = partial(_Hdf5Side, file, extent_bytes, slots)
    return sides


def _add_missing(report: Report) -> None:
    reason = containers.Hdf5.unavailable()
    if reason:
        report.missing.append(reason)


def _sizes(bench: Bench) -> list[tuple[int, int, int]]:
    """Bytes of an extent, extents of the file, and slots."""
    sizes = []
    for extent_bytes in _EXTENT_BYTES:
        slots = min(bench.file.size_bytes // _SLOTS_PART, _MOST_SLOT_BYTES) // extent_bytes
        if slots < _BATCH:
            raise BenchError(
                f"{slots} slots of {extent_bytes >> 10} KiB are too few; pass "
                f"--file-size {_SLOTS_PART * _BATCH * extent_bytes >> 20}M or more"
            )
        sizes.append((extent_bytes, slots * _SLOTS_PART, slots))
    return sizes


def warm(bench: Bench) -> Report:
    """Slots that are full, over a file in the page cache."""
    report = Report(
        "slots", f"Zipf accesses to extents, {_BATCH} at a time, file in the page cache, slots full"
    )
    _add_missing(report)
    file = bench.warm_file(report)
    for extent_bytes, extents, slots in _sizes(bench):
        accesses = _Accesses(extents, extent_bytes)
        with ExitStack() as stack:
            made = {
                name: stack.enter_context(make())
                for name, make in _sides(file, extent_bytes, slots).items()
            }
            contenders = [_repeating(name, side, accesses) for name, side in made.items()]
            _add_rows(bench, report, contenders, accesses, slots)
            for name in (_AUTO, _PREAD):
                ratio = made[name].hit_ratio
                if ratio is not None:
                    report.count(f"{_size(extent_bytes)}: {name}: hit ratio", ratio, "of the keys")
            side = made[_AUTO]
            if isinstance(side, _SlotsSide):
                report.notes.append(f"{_size(extent_bytes)}: engine {side.slots.engine}")
    return report


def cold(bench: Bench) -> Report:
    """New slots over a file that is not in the page cache; making them is counted too."""
    report = Report(
        "slots", f"the same from empty slots, {_BATCH} at a time, file not in the page cache"
    )
    _add_missing(report)
    for extent_bytes, extents, slots in _sizes(bench):
        accesses = _Accesses(extents, extent_bytes)
        contenders = [
            _beginning(name, make, accesses, bench.file)
            for name, make in _sides(bench.file, extent_bytes, slots).items()
        ]
        _add_rows(bench, report, contenders, accesses, slots, warm_ups=1)
    report.notes.append("each round drops the page cache; a host may have the file in its own")
    return report


def shared(bench: Bench) -> Report:
    """Slots that processes share, beside those of one process, where every extent is there."""
    report = Report("slots", "a hit of one key, the extents all in slots, from Python")
    extent_bytes, count = 16 << 10, 64
    keys = np.random.default_rng(2002).integers(0, count, _HITS).tolist()
    with ExitStack() as stack:
        store = stack.enter_context(fremap.open(bench.file.path))
        pages = extent_bytes // PAGE_BYTES
        name = f"bench-{os.getpid()}"
        sides = {
            _OWN: stack.enter_context(fremap.Slots(store, pages, count)),
            _SHARED: stack.enter_context(fremap.Slots(store, pages, count, shared=name)),
        }
        contenders = {}
        for label, slots in sides.items():
            slots.ensure(range(count))
            for what, work in (("ensure", _ensure), ("pin and release", _pin)):
                named = f"{what}: {label}"
                contenders[named] = _hitting(named, partial(work, slots, keys))
        timings = paired(list(contenders.values()), rounds=bench.rounds, operations=_HITS)
        report.rows += [
            times_the_time(
                f"{what}: {_SHARED} beside {_OWN}",
                timings[f"{what}: {_SHARED}"],
                timings[f"{what}: {_OWN}"],
                at_most=2,
            )
            for what in ("ensure", "pin and release")
        ]
        alone, together = (_brought(store, processes) for processes in (1, _PROCESSES))
    report.count("extents that one process brings", alone, "of 16 KiB")
    report.count(
        f"extents that {_PROCESSES} processes bring for the same keys", together, "of 16 KiB"
    )
    report.notes.append(f"{_HITS} hits a round; the counts are of {_HITS} keys by Zipf, 64 slots")
    return report


def _brought(store: fremap.Store, processes: int) -> int:
    """Return how many extents are brought for keys that processes name by turns."""
    extents = 1024
    shares = np.cumsum(1 / np.arange(1, extents + 1))
    drawn = np.random.default_rng(2002).random(_HITS) * shares[-1]
    keys = np.searchsorted(shares, drawn).tolist()
    pages, name = (16 << 10) // PAGE_BYTES, f"bench-{os.getpid()}-{processes}"
    with fremap.Slots(store, pages, 64, shared=name) as slots:
        children = []
        for number in range(processes):
            child = os.fork()
            if child == 0:
                try:
                    _ensure(slots, keys[number::processes])
                finally:
                    os._exit(0)  # without what its parent does at its end
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        stats = slots.stats()
        if stats.hits + stats.misses != len(keys):
            raise BenchError("a process has not named all of its keys")
        return stats.misses


def _ensure(slots: fremap.Slots, keys: list[int]) -> None:
    for key in keys:
        slots.ensure(key)


def _pin(slots: fremap.Slots, keys: list[int]) -> None:
    for key in keys:
        slots.pin(key).release()


def _hitting(name: str, work: Callable[[], None]) -> Contender:
    def run(_number: int) -> Mapping[str, float]:
        return {name: timed(work)}

    return run


def _size(extent_bytes: int) -> str:
    return f"{extent_bytes >> 10} KiB" if extent_bytes < 1 << 20 else f"{extent_bytes >> 20} MiB"


def _repeating(name: str, side: _Side, accesses: _Accesses) -> Contender:
    def run(number: int) -> Mapping[str, float]:
        return {name: timed(partial(accesses.read, side, number))}

    return run


def _beginning(
    name: str, make: Callable[[], _Side], accesses: _Accesses, file: DataFile
) -> Contender:
    def begin(number: int) -> None:
        with make() as side:
            accesses.read(side, number)

    def run(number: int) -> Mapping[str, float]:
        file.drop()
        return {name: timed(partial(begin, number))}

    return run


def _add_rows(
    bench: Bench,
    report: Report,
    contenders: list[Contender],
    accesses: _Accesses,
    slots: int,
    *,
    warm_ups: int = 3,
) -> None:
    label = _size(accesses.extent_pages * PAGE_BYTES)
    timings = paired(contenders, rounds=bench.rounds, operations=accesses.count, warm_ups=warm_ups)
    report.rows += [
        times_faster(f"{label}: than {name}", timings[_AUTO], timings[name])
        for name in _OTHERS
        if name in timings
    ]
    report.notes.append(
        f"{label}: {accesses.count} accesses a round, {slots} slots, "
        f"{_SLOTS_PART} times as many extents"
    )
