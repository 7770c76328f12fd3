"""Shuffle all pages of a file through one window, and check each of them.

Without FILE, a file of 1 GiB with numbered pages is made in a temporary folder
and removed at the end. For comparison, the demo does the same with
remap_file_pages(2), mmap(MAP_FIXED) and np.memmap[ids].
"""

import argparse
import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import competitors
from fremap.bench.options import byte_size
from fremap.cli import picture
from fremap.cli.checksums import file_checksums, page_checksums
from fremap.cli.memory import available_bytes
from fremap.cli.numbered import first_wrong_page, write_numbered_file
from fremap.cli.report import Json, columns, print_json, show, size, speaks_unicode, thousands
from fremap.window import Engine

DEFAULT_SIZE = 1 << 30
COPIED_PAGES = 1 << 16  # np.memmap[ids] makes an array: 256 MiB of it are enough to tell
MAPPED_PAGES = 1 << 20  # a call each: seconds, where vm.max_map_count is no limit
SEED = 2002


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap demo``."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="the file (default: make one)")
    parser.add_argument(
        "--size", type=byte_size, default=DEFAULT_SIZE, help="size of the file made (default: 1G)"
    )
    parser.add_argument(
        "--engine", choices=("auto", "alias", "paged", "eager"), default="auto", help="the engine"
    )


@dataclass(frozen=True)
class Timing:
    """One way of doing it."""

    what: str
    microseconds_a_page: float
    page_count: int
    vma_count: int | None
    stopped_by: str = ""


@dataclass(frozen=True)
class Job:
    """A file, and the pages of it that go through the window."""

    path: str
    numbered: bool
    page_bytes: int
    file_page_count: int
    orders: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    notes: list[str]


@dataclass(frozen=True)
class Shown:
    """What the window showed."""

    engine: str
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    window_vma_count: tuple[int, int]
    process_vma_count: tuple[int, int]
    timings: list[Timing]
    wrong: str


def plan(path: str, *, numbered: bool, notes: list[str]) -> Job:
    """Choose the pages of a file: all of them, or as many as fit memory; in two random orders."""
    with fremap.open(path) as store:
        page_bytes, count = store.page_bytes, store.page_count
    if count == 0:
        raise fremap.ArgumentError(f"{path} is empty; there is no page to show")
    random = np.random.default_rng(SEED)
    most = available_bytes() // 2 // page_bytes
    if count > most:
        notes.append(
            f"{size(count * page_bytes)} do not fit the memory that is free: "
            f"{thousands(most)} of {thousands(count)} pages, chosen at random"
        )
    first = random.permutation(count).astype(np.int64)[:most]
    return Job(path, numbered, page_bytes, count, (first, random.permutation(first)), notes)


@contextmanager
def job_of(arguments: argparse.Namespace) -> Iterator[Job]:
    """Yield what to do with the file given, or with one that is made and removed afterwards."""
    if arguments.file is not None:
        yield plan(arguments.file, numbered=False, notes=[])
        return
    # The window and the page cache (or the file itself, on tmpfs) hold it at the same time.
    room = min(available_bytes() // 3, shutil.disk_usage(tempfile.gettempdir()).free)
    wanted = arguments.size // mmap.PAGESIZE
    page_count = min(wanted, room // mmap.PAGESIZE)
    notes = []
    if page_count < wanted:
        notes.append(
            f"memory or disk is short: the file has {size(page_count * mmap.PAGESIZE)} "
            f"and not {size(arguments.size)}"
        )
    with tempfile.TemporaryDirectory(prefix="fremap-demo-") as folder:
        path = Path(folder) / "numbered"
        write_numbered_file(path, page_count, mmap.PAGESIZE)
        yield plan(str(path), numbered=True, notes=notes)


def choose_engine(asked: Engine) -> Engine:
    """Return an engine for pages in any order: `alias` would stop at vm.max_map_count."""
    if asked != "auto":
        return asked
    return "paged" if fremap.capabilities().engines["paged"].available else "eager"


def checksums_by_page(job: Job) -> npt.NDArray[np.uint64] | None:
    """Read the file by system calls: a checksum for each file page that will be shown."""
    if job.numbered:
        return None
    checksums = np.zeros(job.file_page_count, dtype=np.uint64)
    checksums[job.orders[0]] = file_checksums(job.path, job.orders[0], job.page_bytes)
    return checksums


def check(
    window: fremap.Window,
    order: npt.NDArray[np.int64],
    checksums: npt.NDArray[np.uint64] | None,
) -> str:
    """Compare every window page with its file page; return what is wrong, or nothing."""
    if checksums is None:
        wrong = first_wrong_page(window.pages, order)
    else:
        right = page_checksums(window.pages) == checksums[order]
        wrong = None if right.all() else int(np.argmin(right))
    return "" if wrong is None else f"window page {wrong} does not show file page {order[wrong]}"


def remap(window: fremap.Window, order: npt.NDArray[np.int64]) -> float:
    """Return what it costs to remap all pages, in µs a page."""
    begin = time.perf_counter()
    window.remap(order)
    return (time.perf_counter() - begin) / len(order) * 1e6


def shuffle(job: Job, engine: Engine) -> Shown:
    """Remap all pages of a window, several times; check them after the first and the last."""
    first, last = job.orders
    checksums = checksums_by_page(job)  # brings the file into the page cache
    with (
        fremap.open(job.path) as store,
        fremap.Window(store, len(first), engine=engine) as window,
    ):
        before = window.mapping
        vmas = [(window.vma_count, competitors.process_vma_count())]
        fresh = remap(window, first)
        wrong = [check(window, first, checksums)]
        again = median(remap(window, order) for order in (last, first, last))
        wrong.append(check(window, last, checksums))
        vmas.append((window.vma_count, competitors.process_vma_count()))
        of_window, of_process = zip(*vmas, strict=True)
        timings = [
            Timing(f"fremap {engine}: {what}", cost, len(first), window.vma_count)
            for what, cost in (("first remap, fresh memory", fresh), ("remapped again", again))
        ]
        after = window.mapping
    found = "; ".join(filter(None, wrong))
    return Shown(engine, before, after, of_window, of_process, timings, found)


def timing(what: str, outcome: competitors.Outcome) -> Timing:
    """Return what a competitor did as a line of the table."""
    stopped = ""
    if outcome.errno == errno.ENOMEM:
        limit = Path("/proc/sys/vm/max_map_count").read_text().strip()
        stopped = f"ENOMEM: vm.max_map_count = {limit}"
    elif outcome.errno is not None:
        stopped = str(outcome.refusal)
    return Timing(what, outcome.microseconds_a_page, outcome.completed, outcome.vma_count, stopped)


def compete(job: Job) -> Iterator[Timing]:
    """Do it the other ways, until the kernel refuses."""
    order = job.orders[1][:MAPPED_PAGES]
    writable = os.access(job.path, os.W_OK)  # remap_file_pages(2) wants a descriptor that may write
    fd = os.open(job.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        for what, competitor in (
            ("remap_file_pages(2)", competitors.remap_file_pages),
            ("mmap(MAP_FIXED|MAP_POPULATE)", competitors.mmap_fixed),
        ):
            yield timing(what, competitor(fd, order, page_bytes=job.page_bytes))
    finally:
        os.close(fd)
    # np.memmap has whole pages only: leave out a last page that the file's end cuts short.
    most = min(COPIED_PAGES, available_bytes() // 4 // job.page_bytes)
    whole = order[order < Path(job.path).stat().st_size // job.page_bytes][:most]
    if len(whole):
        copied = competitors.memmap_take(job.path, whole, page_bytes=job.page_bytes)
        yield Timing("np.memmap[ids], a copy", copied.microseconds_a_page, len(whole), None)


def as_json(job: Job, shown: Shown, timings: list[Timing]) -> Json:
    """Return the result as ``--json`` prints it."""
    return {
        "file": None if job.numbered else job.path,
        "page_bytes": job.page_bytes,
        "file_page_count": job.file_page_count,
        "window_page_count": len(job.orders[0]),
        "notes": list(job.notes),
        "engine": shown.engine,
        "verified": not shown.wrong,
        "wrong": shown.wrong,
        "window_vma_count": dict(zip(("before", "after"), shown.window_vma_count, strict=True)),
        "process_vma_count": dict(zip(("before", "after"), shown.process_vma_count, strict=True)),
        "timings": [asdict(line) for line in timings],
    }


def ratios(timings: list[Timing]) -> str:
    """Return how the window that was remapped again compares with the other ways."""
    again, others = timings[1], timings[2:]
    rows = []
    for other in others:
        ratio = other.microseconds_a_page / again.microseconds_a_page
        rows.append(("remapped again:", f"{ratio:.1f} times", "as fast as " + other.what))
    return columns(rows, right=(1,))


def report(job: Job, shown: Shown, timings: list[Timing]) -> str:
    """Return the result as a person reads it."""
    unicode = speaks_unicode()
    pictures = [
        picture.draw(mapping, job.file_page_count, unicode=unicode)
        for mapping in (shown.before, shown.after)
    ]
    page_count = len(job.orders[0])
    drawn = picture.dots_drawn(page_count, unicode=unicode)
    titles = ("before: linear", "after: all pages shuffled")
    lines = ["  " + line for line in picture.side_by_side(pictures[0], pictures[1], titles)]
    lines.append(f"  across: window pages, up: file pages; {drawn} of them drawn")
    lines.append("")
    rows = [("", "before", "after")]
    for what, counts in (
        ("kernel mappings (VMAs) of the window", shown.window_vma_count),
        ("of the whole process", shown.process_vma_count),
    ):
        rows.append((what, thousands(counts[0]), thousands(counts[1])))
    lines += [columns(rows, right=(1, 2)), ""]
    table = [("file in the page cache", "µs a page", "pages", "VMAs", "stopped by")]
    table += [
        (
            line.what,
            f"{line.microseconds_a_page:.2f}",
            thousands(line.page_count),
            "" if line.vma_count is None else thousands(line.vma_count),
            line.stopped_by,
        )
        for line in timings
    ]
    lines += [columns(table, right=(1, 2, 3)), ""]
    lines += [ratios(timings), ""]
    if shown.wrong:
        lines.append(f"  WRONG: {shown.wrong}")
    else:
        lines.append(f"  every page is right: {thousands(page_count)} compared, twice")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    engine = choose_engine(arguments.engine)
    with job_of(arguments) as job:
        if not arguments.json:
            name = "numbered pages in a temporary file" if job.numbered else job.path
            whole = size(job.file_page_count * job.page_bytes)
            show(f"{name}: {whole}, {thousands(job.file_page_count)} pages")
            for note in job.notes:
                show(f"  {note}")
        shown = shuffle(job, engine)
        timings = [*shown.timings, *compete(job)]
        if arguments.json:
            print_json(as_json(job, shown, timings))
        else:
            show(report(job, shown, timings))
    return 1 if shown.wrong else 0
