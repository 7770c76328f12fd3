"""Each error is fremap's and also the builtin that people catch."""

import errno
import os
import pickle
from collections.abc import Iterator

import fremap
import pytest
from fremap import _core, errors

BUILTINS = {
    "DuplicatePageError": ValueError,
    "ArgumentError": ValueError,
    "ActorLostError": ConnectionError,
    "BudgetError": MemoryError,
    "SlotsFullError": MemoryError,
    "TakeCancelledError": Exception,
    "TakeTimeoutError": TimeoutError,
    "ClosedError": ValueError,
    "ForkError": RuntimeError,
    "FormatError": ValueError,
    "MappingLimitError": OSError,
    "MemoryLimitError": MemoryError,
    "PageRangeError": IndexError,
    "ArgumentTypeError": TypeError,
    "PlacedPageError": ValueError,
    "ProviderError": OSError,
    "ProviderTimeoutError": TimeoutError,
    "RemapError": OSError,
    "StoreError": OSError,
    "StoreExistsError": FileExistsError,
    "StoreIsDirectoryError": IsADirectoryError,
    "StoreNotDirectoryError": NotADirectoryError,
    "StoreNotFoundError": FileNotFoundError,
    "StorePermissionError": PermissionError,
    "TruncatedError": OSError,
    "UnsupportedError": NotImplementedError,
    "ViewsAliveError": BufferError,
}


@pytest.fixture(autouse=True)
def _no_failures() -> Iterator[None]:
    yield
    _core.clear_failures()


def test_the_table_is_complete() -> None:
    assert set(BUILTINS) | {"FremapError"} == set(errors.__all__)
    assert set(errors.__all__) <= set(fremap.__all__)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_each_is_a_builtin_too(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(fremap, name), fremap.FremapError)
    assert issubclass(getattr(fremap, name), builtin)


@pytest.mark.parametrize(
    ("number", "builtin"),
    [
        (errno.ENOENT, FileNotFoundError),
        (errno.EACCES, PermissionError),
        (errno.EPERM, PermissionError),
        (errno.EEXIST, FileExistsError),
        (errno.EISDIR, IsADirectoryError),
        (errno.ENOTDIR, NotADirectoryError),
        (errno.EIO, OSError),
        (errno.ENOSPC, OSError),
    ],
)
def test_open_fails_as_open_does(number: int, builtin: type[OSError]) -> None:
    _core.inject_failure("open", 0, number, 1)
    with pytest.raises(builtin) as raised:
        fremap.open("/dev/null")
    assert isinstance(raised.value, fremap.StoreError)
    assert raised.value.errno == number
    assert raised.value.filename == "/dev/null"
    assert raised.value.strerror == f"open: {os.strerror(number)}"
    assert type(raised.value).__name__ in errors.__all__
    assert type(raised.value).__module__ == "fremap"


def test_errors_pass_between_processes() -> None:
    with fremap.MemoryStore(4096) as store:
        with pytest.raises(fremap.PageRangeError) as raised:
            store.read(7)
        copy = pickle.loads(pickle.dumps(raised.value))
        assert (str(copy), copy.index, copy.limit) == (str(raised.value), 7, 1)
    with pytest.raises(FileNotFoundError) as missing:
        fremap.open("/nowhere")
    other = pickle.loads(pickle.dumps(missing.value))
    assert type(other) is type(missing.value)
    assert (other.errno, other.filename, other.completed) == (errno.ENOENT, "/nowhere", 0)


def test_a_failed_read_says_what_was_done(engine: str) -> None:
    with (
        fremap.MemoryStore(8 * 4096, page_bytes=4096) as store,
        fremap.Window(store, 4, engine=engine) as window,
    ):
        assert window.remap([7, 6]).all()
        with pytest.raises(fremap.PageRangeError) as raised:
            window.remap([1, 2, 8])
        assert (raised.value.index, raised.value.limit) == (8, 8)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("AliasError", "DuplicatePageError"),
        ("PageTypeError", "ArgumentTypeError"),
        ("Hold", "SlotsPin"),
    ],
)
def test_old_names_work_and_warn(old: str, new: str) -> None:
    with pytest.warns(
        DeprecationWarning, match=f"fremap.{old} is now called fremap.{new}"
    ) as caught:
        assert getattr(fremap, old) is getattr(fremap, new)
    assert caught[0].filename == __file__
    assert old not in dir(fremap)


def test_injecting_needs_a_known_call() -> None:
    with pytest.raises(ValueError, match="sendfile"):
        _core.inject_failure("sendfile", 0, 5, 1)
