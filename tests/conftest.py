"""What every test may use: capability marks, engines, numbered files; and the rule about skips.

A test that needs something of the kernel says so by name, and is skipped only
where `fremap.capabilities()` says that this process does not have it::

    @pytest.mark.needs("paged", "uffd_move")
    def test_swap(numbered_file, numbered_pages): ...

    def test_remap(engine): ...  # runs once for each engine that works here

    @pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)
    def test_readers(engine): ...

All skips are listed at the end of the run. A skip for any other reason, or
for a capability that is there, fails the run.
"""

import functools
import importlib.util
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from forking import fork
from prepared_python import PreparedPython

ENGINES = ("alias", "paged", "eager")
PACKAGES = (
    "anndata", "dask", "fsspec", "grain", "h5py", "ml_dtypes", "moto", "obstore", "pandas",
    "pyarrow", "ray", "s3fs", "torch", "torchdata", "xarray", "zarr",
)  # fmt: skip
SKIP_PREFIX = "needs "
FOLDERS = itertools.count()
FAILED = pytest.StashKey[bool]()
RIGHT = pytest.StashKey[list[tuple[str, str]]]()
WRONG = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests marked long")
    parser.addoption(
        "--examples", type=int, default=20, help="Hypothesis examples a test (default: %(default)s)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*capabilities): skip where fremap.capabilities() says one is missing"
    )
    config.addinivalue_line("markers", "long: runs only with --long (make test-long)")
    config.addinivalue_line(
        "markers", "once: the same for all users and kernels; one run of `make test` has it"
    )
    config.addinivalue_line(
        "markers", "any_user: the same for all users; the run as an ordinary user leaves it out"
    )
    config.addinivalue_line("markers", "slow: takes seconds; `make quick` leaves it out")
    config.addinivalue_line("markers", "thread_unsafe: NumPy's, whose tests of memmap run here")
    examples = config.getoption("--examples")
    settings.register_profile("suite", max_examples=examples, deadline=None, print_blob=True)
    settings.load_profile("suite")
    config.stash[RIGHT] = []
    config.stash[WRONG] = []


def may_limit_memory() -> bool:
    """Whether this process may make a memory cgroup, of version 1 or 2."""
    top = Path("/sys/fs/cgroup")
    if os.access(top / "memory", os.W_OK):
        return True
    controllers = top / "cgroup.controllers"
    return (
        controllers.exists()
        and "memory" in controllers.read_text().split()
        and os.access(top / "cgroup.subtree_control", os.W_OK)
    )


@functools.cache
def available() -> dict[str, bool]:
    """Name of each capability and engine → whether this process has it."""
    import fremap

    capabilities = fremap.capabilities()
    names = {name: probe.available for name, probe in capabilities.probes.items()}
    names.update({name: engine.available for name, engine in capabilities.engines.items()})
    names["memory_cgroup"] = may_limit_memory()
    # Packages whose arrays and files fremap takes: tested where they are installed.
    names.update({name: importlib.util.find_spec(name) is not None for name in PACKAGES})
    return names


def skip_unless(*capabilities: str) -> None:
    """Skip the test under way unless this process has all of `capabilities`."""
    unknown = [name for name in capabilities if name not in available()]
    if unknown:
        pytest.fail(f"unknown capabilities {unknown}; there are {sorted(available())}")
    missing = [name for name in capabilities if not available()[name]]
    if missing:
        pytest.skip(SKIP_PREFIX + ", ".join(missing))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        skip_unless(*mark.args)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine that works here; the test runs once for each of them."""
    skip_unless(request.param)
    return str(request.param)


SIGNAL: dict[str, Any] = {"fault": "signal", "budget": None}
#: Windows that are written and not coherent: how each kind is asked for.
WRITE_BACK = {
    "paged-async": {"engine": "paged", "tracking": "async"},
    "paged-sync": {"engine": "paged", "tracking": "sync"},
    "paged-async-signal": {"engine": "paged", "tracking": "async", **SIGNAL},
    "paged-sync-signal": {"engine": "paged", "tracking": "sync", **SIGNAL},
    "eager": {"engine": "eager"},
}
#: What a kernel needs to notice stores in either way.
TRACKING_NEEDS = {"async": ("uffd_wp_async", "uffd_move"), "sync": ("uffd_wp",)}


@pytest.fixture(params=WRITE_BACK)
def write_back(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a window takes to write back to its store; the test runs once for each kind."""
    from fremap import Prot

    options = WRITE_BACK[request.param]
    skip_unless(options["engine"], *TRACKING_NEEDS.get(options.get("tracking"), ()))
    return {"prot": Prot.WRITE, "coherent": False, **options}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = report.failed or item.stash.get(FAILED, False)
    return report


@pytest.fixture
def tmp_path(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A new folder, which stays if the test fails.

    As pytest's own, but for the link to the newest folder of each name: to make it anew for each
    test takes longer than most tests do.
    """
    name = re.sub(r"\W", "_", request.node.name)[:30]
    path = tmp_path_factory.getbasetemp() / f"{name}{next(FOLDERS)}"
    path.mkdir(mode=0o700)
    yield path
    if not request.node.stash.get(FAILED, False):
        # What a process still writes there is removed with the folder of the run.
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def prepared_python() -> Iterator[PreparedPython]:
    """`prepared_python.run(program, *arguments)` runs a Python file in a new process, sooner."""
    python = PreparedPython()
    yield python
    python.close()


@pytest.fixture
def in_child() -> Callable[..., int]:
    """`in_child(body)` runs it in a child of fork; an exception there is the test's failure.

    For what changes the process, and for what kills it: `in_child(body, then)` calls
    `then(child)` meanwhile. Returns how the child ended, as `waitpid` tells it. No
    window may be open meanwhile.
    """

    def run(body: Callable[[], None], then: Callable[[int], None] | None = None) -> int:
        reading, writing = os.pipe()
        child = fork(body, writing)
        os.close(writing)
        try:
            if then is not None:
                then(child)
        finally:
            with open(reading) as pipe:
                text = pipe.read()
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if text or code > 0:
            pytest.fail(text or f"the child ended with {code}")
        return code

    return run


# ---------------------------------------------------------------------------
# Numbered pages: every word says which page it belongs to, and where in it.
# ---------------------------------------------------------------------------

WORD_INDEX_BITS = 20  # pages of up to 8 MiB


def numbered(pages: Sequence[int] | np.ndarray, page_bytes: int = 4096) -> np.ndarray:
    """The content of numbered pages: uint8 (len(pages), page_bytes).

    Word w of page p is `(p + 1) << 20 | w`, little endian: no word is zero, and
    no two words of a file are alike, so any mixture of pages shows.
    """
    words = np.arange(page_bytes // 8, dtype="<u8")
    first = (np.asarray(pages, dtype="<u8") + np.uint64(1)) << np.uint64(WORD_INDEX_BITS)
    return (first[:, None] | words[None, :]).view(np.uint8)


@pytest.fixture
def numbered_pages() -> Callable[..., np.ndarray]:
    """`numbered_pages(pages, page_bytes=4096)` → what these pages hold, uint8 (n, page_bytes)."""
    return numbered


@pytest.fixture
def numbered_file(tmp_path: Path) -> Callable[..., Path]:
    """`numbered_file(page_count, page_bytes=4096, *, tail_bytes=0, name="numbered.bin")` → Path.

    A file of `page_count` numbered pages and then the first `tail_bytes` bytes
    of one more.
    """

    def make(
        page_count: int,
        page_bytes: int = 4096,
        *,
        tail_bytes: int = 0,
        name: str = "numbered.bin",
    ) -> Path:
        path = tmp_path / name
        at_once = max(1, (1 << 22) // page_bytes)
        with path.open("wb") as file:
            for first in range(0, page_count, at_once):
                pages = range(first, min(first + at_once, page_count))
                file.write(numbered(pages, page_bytes).tobytes())
            if tail_bytes:
                file.write(numbered([page_count], page_bytes).tobytes()[:tail_bytes])
        return path

    return make


@pytest.fixture
def settled_file(tmp_path: Path) -> Callable[[int], Path]:
    """`settled_file(page_count)` → a file of `fremap.testing.numbered_words`, all of it written.

    The kernel reads no page of it ahead or anew behind the test's back.
    """

    def make(page_count: int) -> Path:
        from fremap.testing import numbered_words, wait_until_settled

        path = tmp_path / "pages"
        path.write_bytes(numbered_words(range(page_count)).tobytes())
        wait_until_settled(path)
        return path

    return make


@pytest.fixture
def big_enough(tmp_path: Path) -> Callable[..., None]:
    """`big_enough(memory=bytes, disk=bytes)` fails, saying why, where there is not that much."""

    def check(memory: int = 0, disk: int = 0) -> None:
        import os

        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free_memory = int(fields["MemAvailable"].split()[0]) * 1024
        room = os.statvfs(tmp_path)
        free_disk = room.f_bavail * room.f_frsize
        if memory > free_memory:
            pytest.fail(
                f"this test needs {memory >> 20} MiB of memory, {free_memory >> 20} are free"
            )
        if disk > free_disk:
            pytest.fail(
                f"this test needs {disk >> 20} MiB in {tmp_path}, {free_disk >> 20} are free"
            )

    return check


# ---------------------------------------------------------------------------
# Skips: listed, and a failure where the capability is there.
# ---------------------------------------------------------------------------


def wrong_skip(reason: str) -> str | None:
    """Why a skip with this reason is not allowed, or None."""
    if not reason.startswith(SKIP_PREFIX):
        return "names no capability; use pytest.mark.needs(...)"
    names = reason.removeprefix(SKIP_PREFIX).split(", ")
    unfounded = [name for name in names if available().get(name, True)]
    return f"this process has {', '.join(unfounded)}" if unfounded else None


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected failure: {report.wasxfail}"
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


class SkipRule:
    """Collects the skips of a run and judges them at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            reason = skip_reason(report)
            wrong = wrong_skip(reason)
            if wrong is None:
                self.config.stash[RIGHT].append((report.nodeid, reason))
            else:
                self.config.stash[WRONG].append((report.nodeid, f"{reason}: {wrong}"))

    pytest_runtest_logreport = note
    pytest_collectreport = note


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(SkipRule(session.config), "fremap-skip-rule")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    if session.config.stash[WRONG]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    right, wrong = config.stash[RIGHT], config.stash[WRONG]
    terminalreporter.section(f"skipped: {len(right)} allowed, {len(wrong)} not allowed")
    by_reason: dict[str, list[str]] = {}
    for nodeid, reason in right:
        by_reason.setdefault(reason, []).append(nodeid)
    for reason, nodeids in sorted(by_reason.items()):
        terminalreporter.write_line(f"{reason}: {len(nodeids)} tests")
        for nodeid in nodeids:
            terminalreporter.write_line(f"    {nodeid}")
    for nodeid, why in wrong:
        terminalreporter.write_line(f"NOT ALLOWED {nodeid}: {why}", red=True)
