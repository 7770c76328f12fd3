"""Processes that provide the pages of a store, seen from both sides.

`program` and `payload` are what the core starts such a process with; `main` is what runs
there. It unpickles a function, and calls it for each request that comes by its socket: which
pages are wanted stands at the front of memory that both processes share, and the function
writes their content behind that.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import pickle
import struct
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fremap import _core
from fremap.errors import ArgumentError, ArgumentTypeError, UnsupportedError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt

    Fill: TypeAlias = Callable[[npt.NDArray[np.int64], npt.NDArray[np.uint8]], None]

__all__ = ["main", "number_of", "payload", "program", "provide"]

# The descriptors that the core gives to the process.
_SOCKET, _MEMORY, _PAYLOAD = 3, 4, 5
_REQUEST = struct.Struct("=QQ")  # its number, how many pages
_REPLY = struct.Struct("=QIIII")  # the request, an errno or 0, the bytes of three texts
# Where the numbers of pages stand, and why a request has failed.
_WORDS_AT = mmap.PAGESIZE
_LAYOUT = struct.Struct("=QQQQ")  # bytes before the content, of a page; most pages; the parent
# Of exceptions that do not say it themselves.
_NUMBERS: dict[type[BaseException], int] = {
    FileNotFoundError: errno.ENOENT,
    IsADirectoryError: errno.EISDIR,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
}
_MOST_REASON_BYTES = 2 << 10
_MOST_TRACEBACK_BYTES = 24 << 10


def program() -> list[bytes]:
    """Return the command that runs `main` in an interpreter like this one."""
    import subprocess
    from multiprocessing import spawn

    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"import sys; sys.path.append({here!r}); from fremap.providing import main; main()"
    return [os.fsencode(part) for part in (spawn.get_executable(), *flags, "-P", "-c", code)]


def payload(operation: str, fill: Fill, what: str = "fill") -> bytes:
    """Return what `main` is to unpickle: how to find modules, then the function.

    Messages call the function `what`; if it is not the caller's, what it is made of is.

    Raises
    ------
    ArgumentTypeError
        It is no function, or cannot be pickled.
    ArgumentError
        It could not be found in another process.
    UnsupportedError
        This is a provider process that imports the main program.
    """
    from multiprocessing import process

    if not callable(fill):
        raise ArgumentTypeError(f"{operation}: fill must be a function, not {type(fill).__name__}")
    if getattr(process.current_process(), "_inheriting", False):
        raise UnsupportedError(
            f"{operation}: the main program is imported by a provider process, which must not make "
            'stores of its own; put the code of the program under `if __name__ == "__main__":`'
        )
    try:
        pickled = pickle.dumps(fill)
    except Exception as error:
        if what == "fill":
            why, do = "runs it", "a function of a module, or an object of a class that has __call__"
        else:
            why, do = "needs it", "a URL and storage_options, of which a file system is made"
        raise ArgumentTypeError(
            f"{operation}: {what} cannot be pickled, as another process {why} ({error}); give {do}"
        ) from error
    # Else it is not run a second time: it need not be made for that.
    main_program = _main_program() if b"__main__" in pickled else {}
    if not main_program and b"__main__" in pickled:
        raise ArgumentError(
            f"{operation}: {what} is defined in an interactive session, where other processes "
            "cannot find it; define it in a module and import it"
        )
    return pickle.dumps({**_surroundings(), **main_program}) + pickled


def _surroundings() -> dict[str, Any]:
    """Return what the process takes over from this one, as `multiprocessing.spawn` has it."""
    found: dict[str, Any] = {"sys_path": list(sys.path), "sys_argv": list(sys.argv)}
    with contextlib.suppress(OSError):  # the current directory was removed
        found["dir"] = found["orig_dir"] = os.getcwd()
        found["sys_path"] = [part or found["dir"] for part in sys.path]
    return found


def _main_program() -> dict[str, str]:
    """Return how another process finds the main program; nothing of an interactive session."""
    main_module = sys.modules["__main__"]
    name = getattr(getattr(main_module, "__spec__", None), "name", None)
    if name is not None:
        return {"init_main_from_name": name}
    path = getattr(main_module, "__file__", None)
    return {} if path is None else {"init_main_from_path": os.path.abspath(path)}


def provide(fill: Fill, pages: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
    """Have `fill` write pages, which rise, into `out`, which holds zeros."""
    returned: object = fill(pages, out)  # type: ignore[func-returns-value]  # its author may err
    if returned is not None:
        raise TypeError(
            f"fill returned {type(returned).__name__}; it must write the pages into out, and "
            "return None"
        )


def main() -> None:
    """Provide pages until the connection is hung up."""
    import socket  # `import fremap` does without it

    _close_others()
    with socket.socket(fileno=_SOCKET) as channel:
        _serve(channel)


def _serve(channel: socket.socket) -> None:
    memory = mmap.mmap(_MEMORY, 0)
    head_bytes, page_bytes, page_count, parent = _LAYOUT.unpack_from(memory)
    _core.end_with(_SOCKET, parent)
    try:
        fill = _load()
    except BaseException as error:  # noqa: BLE001 - told to whoever waits for pages
        channel.send(_refusal(memory, head_bytes - _WORDS_AT, 0, error))
        return
    content = np.frombuffer(memory, np.uint8, page_count * page_bytes, head_bytes)
    content = content.reshape(page_count, page_bytes)
    channel.send(_REPLY.pack(0, 0, 0, 0, 0))
    while request := channel.recv(_REQUEST.size):
        number, count = _REQUEST.unpack(request)
        pages = np.frombuffer(memory, np.int64, count, _WORDS_AT).copy()
        out = content[:count]
        if not getattr(fill, "fills_all", False):
            out.fill(0)
        try:
            provide(fill, pages, out)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for the pages
            reply = _refusal(memory, head_bytes - _WORDS_AT, number, error)
        else:
            reply = _REPLY.pack(number, 0, 0, 0, 0)
        channel.send(reply)


def _close_others() -> None:
    """Close what the process has inherited besides its three descriptors and the usual ones."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > _PAYLOAD:
            with contextlib.suppress(OSError):  # that of the listing
                os.close(int(name))


def _load() -> Fill:
    """Become like the process that started this one, and unpickle the function."""
    from multiprocessing import process, spawn

    current = process.current_process()
    # Every process has the same open file, and with it one position.
    with mmap.mmap(_PAYLOAD, 0, prot=mmap.PROT_READ) as memory:
        stream = io.BytesIO(memory)
    current._inheriting = True  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    try:
        spawn.prepare(pickle.load(stream))  # noqa: S301 - of the process that started this one
        fill: Fill = pickle.load(stream)  # noqa: S301
    finally:
        del current._inheriting  # type: ignore[attr-defined]  # noqa: SLF001
    return fill


def _refusal(memory: mmap.mmap, room: int, number: int, error: BaseException) -> bytes:
    """Write to `memory` why a request has failed; return the reply that tells of it."""
    import traceback

    reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[:1]
    lines = "".join(traceback.format_exception(error.with_traceback(_from_fill(error))))
    texts = [
        "".join(reason).encode(errors="replace")[:_MOST_REASON_BYTES],
        lines.encode(errors="replace")[-_MOST_TRACEBACK_BYTES:],
    ]
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # noqa: S301 - made a line before
    except Exception:  # noqa: BLE001 - pickling runs code of any class; its text is told anyway
        pickled = b""
    texts.append(pickled if sum(map(len, texts)) + len(pickled) <= room else b"")
    told = b"".join(texts)
    memory[_WORDS_AT : _WORDS_AT + len(told)] = told
    return _REPLY.pack(number, number_of(error), *map(len, texts))


def _from_fill(error: BaseException) -> TracebackType | None:
    """Return the traceback without the frames of this module at its beginning."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_code.co_filename == __file__:
        where = where.tb_next
    return where


def number_of(error: BaseException) -> int:
    """Return the errno that says best what an exception means."""
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and isinstance(number, int) and 0 < number < 1 << 12:
        return number
    return next((code for kind, code in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
