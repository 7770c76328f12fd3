"""Programs in processes of their own that need not import NumPy, which takes most of their time.

A process that has imported NumPy forks for each program. The child has not imported fremap and has
one thread: to fremap it is a new process. It runs the program as `__main__`, and ends as
an interpreter does.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

SET_PARENT_DEATH_SIGNAL = 1


class PreparedPython:
    """The process that forks, which the first program starts."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                pass_fds=[other.fileno()],
                # With OpenBLAS's threads it would not fork as a process of one thread does.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
            )
        self._answers = self._socket.makefile("rb")

    def close(self) -> None:
        """End the process, if it was started."""
        if self._process is not None:
            self._answers.close()
            self._socket.close()
            self._process.wait()
            self._process = None

    def run(
        self, program: Path, *arguments: object, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program, as `subprocess.run(capture_output=True, text=True)` does."""
        if self._process is None:
            self._start()
        try:
            return self._run(program, *arguments, timeout=timeout)
        except BaseException:
            # What it has not answered yet would be taken for an answer about the next program.
            if self._process is not None:
                self._process.kill()  # and with it the program
                self.close()
            raise

    def _run(
        self, program: Path, *arguments: object, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        words = [str(program), *map(str, arguments)]
        with contextlib.ExitStack() as stack:
            pipes = [os.pipe() for _ in ("stdout", "stderr")]
            for reading, _ in pipes:
                stack.callback(os.close, reading)
            request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
            try:
                length = len(request).to_bytes(8, "big")
                socket.send_fds(self._socket, [length], [writing for _, writing in pipes])
            finally:
                for _, writing in pipes:
                    os.close(writing)
            self._socket.sendall(request)
            output = read_until_closed([reading for reading, _ in pipes], timeout)
            code = int(self._answers.readline())
        stdout, stderr = (text.decode() for text in output)
        return subprocess.CompletedProcess(words, code, stdout, stderr)


def read_until_closed(pipes: list[int], timeout: float) -> list[bytes]:
    """Return all that comes from some pipes."""
    deadline = time.monotonic() + timeout
    output = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"a program runs for longer than {timeout} s: {output}")
            for key, _ in selector.select(left):
                if more := os.read(key.fd, 1 << 16):
                    output[key.fd] += more
                else:
                    selector.unregister(key.fd)
    return list(output.values())


def wait_for_program(connection: socket.socket) -> list[str]:
    """Fork for each request; return in the child, with its words."""
    while True:
        length, pipes, _, _ = socket.recv_fds(connection, 8, 2)
        if not length:
            os._exit(0)
        request = b""
        while len(request) < int.from_bytes(length, "big"):
            request += connection.recv(int.from_bytes(length, "big") - len(request))
        server = os.getpid()
        child = os.fork()
        if child == 0:
            break
        for pipe in pipes:
            os.close(pipe)
        _, status = os.waitpid(child, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    connection.close()
    words, folder, environment = json.loads(request)
    for stream, pipe in enumerate(pipes, 1):
        os.dup2(pipe, stream)
        os.close(pipe)
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)  # it was ended before
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return words


if __name__ == "__main__":
    import numpy as np  # noqa: F401

    sys.argv = wait_for_program(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.path.dirname(sys.argv[0])
    # A module as new as that of a program. What it spawns imports the file that it names.
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__dict__.update(__file__=sys.argv[0], __builtins__=builtins)
    exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"), main.__dict__)
