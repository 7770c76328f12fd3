"""Stores over objects of S3 and of other file systems; the programs of the documentation."""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.remote import Facts, FsspecReader, ObstoreReader, Range
from servers import COUNT, PAGE, TAIL, Served, Server, content, npy_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

needs_s3 = pytest.mark.needs("moto", "obstore", "s3fs")


# S3, by each of the ways.


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 client that has a bucket with an object of numbered pages."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="pages")
    client.put_object(Bucket="pages", Key="a/object", Body=content(range(COUNT)).tobytes() + TAIL)
    return client


def s3_source(kind: str, endpoint: str) -> tuple[Any, dict[str, Any]]:
    if kind == "url":
        return "s3://pages/a/object", {}
    options = {"client_kwargs": {"endpoint_url": endpoint}}
    if kind == "fsspec url":
        return "s3://pages/a/object", {"storage_options": options}
    if kind == "fsspec":
        import s3fs

        return (s3fs.S3FileSystem(**options), "pages/a/object"), {}
    from obstore.store import S3Store

    store = S3Store("pages", endpoint=endpoint, client_options={"allow_http": True})
    return (store, "a/object"), {}


@needs_s3
@pytest.mark.once
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["url", "fsspec url", "fsspec", "obstore"])
def test_objects_in_s3(kind: str, endpoint: str, bucket: Any) -> None:
    source, options = s3_source(kind, endpoint)
    with fremap.open(source, **options) as store:
        assert store.size == COUNT * PAGE + len(TAIL)
        np.testing.assert_array_equal(store.read([9, 3, 4, 60]), content([9, 3, 4, 60]))
        np.testing.assert_array_equal(store.read(range(0, 64, 2)), content(range(0, 64, 2)))
        np.testing.assert_array_equal(store.read(7), content([7]))
        assert store.read(64)[0, : len(TAIL)].tobytes() == TAIL
        bucket.put_object(Bucket="pages", Key="a/object", Body=bytes(len(TAIL) + COUNT * PAGE))
        for pages in ([3], [1, 5, 9]):
            with pytest.raises(fremap.ProviderError, match="has changed since") as caught:
                store.read(pages)
            assert caught.value.errno == errno.ESTALE


@needs_s3
@pytest.mark.once
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["url", "fsspec url"])
def test_objects_that_are_not_there(kind: str, endpoint: str, bucket: Any) -> None:
    source, options = s3_source(kind, endpoint)
    with pytest.raises(fremap.StoreNotFoundError):
        fremap.open(source.replace("object", "nothing"), **options)


@needs_s3
@pytest.mark.once
def test_rows_in_s3(endpoint: str, bucket: Any) -> None:
    table = np.arange(400_000, dtype=np.int32).reshape(-1, 4)
    bucket.put_object(Bucket="pages", Key="t.npy", Body=npy_bytes(table))
    ids = np.random.default_rng(0).integers(0, len(table), 500)
    with fremap.rows("s3://pages/t.npy") as rows:
        np.testing.assert_array_equal(rows.take(ids), table[ids])


# Stores of obstore, asked for few ranges and for many.

FEW, MANY = range(0, 15, 5), range(0, 1000, 5)


def reader_of(server: Server, in_flight: int = 32) -> ObstoreReader:
    from obstore.store import HTTPStore

    store = HTTPStore.from_url(server.base, client_options={"allow_http": True})
    return ObstoreReader(store, "object", in_flight, retries=0)


def fetched(reader: ObstoreReader, pieces: Iterable[int], facts: Facts | None = None) -> bytes:
    """What the reader says is in pieces of 4 KiB."""
    memory = memoryview(bytearray(4096 * len(list(pieces))))
    places = range(0, len(memory), 4096)
    ranges = [
        Range(piece * 4096, memory[place : place + 4096])
        for piece, place in zip(pieces, places, strict=True)
    ]
    reader.fetch(ranges, facts or reader.facts())
    return bytes(memory)


@pytest.mark.needs("obstore")
@pytest.mark.parametrize("pieces", [[7], FEW, MANY])
def test_ranges_go_where_they_belong(pieces: Sequence[int], server: Server) -> None:
    reader = reader_of(server)
    wanted = b"".join(server.served.content[at * 4096 :][:4096] for at in pieces)
    assert fetched(reader, pieces) == wanted
    assert fetched(pickle.loads(pickle.dumps(reader)), pieces) == wanted


@pytest.mark.needs("obstore")
@pytest.mark.parametrize(
    ("pieces", "in_flight", "at_once"),
    [(FEW, 32, 3), (FEW, 1, 1), (MANY, 7, 7), (MANY, 10, 10), (MANY, 25, 20)],
)
def test_requests_of_obstore_are_limited(
    pieces: Sequence[int], in_flight: int, at_once: int, server: Server
) -> None:
    """Many ranges are asked for by calls, each of which has ten requests in flight."""
    reader, served = reader_of(server, in_flight), server.served
    facts = reader.facts()
    served.gate.clear()
    reading = threading.Thread(target=lambda: fetched(reader, pieces, facts))
    reading.start()
    while served.at_once < at_once:
        reading.join(0.01)
        assert reading.is_alive()
    served.gate.set()
    reading.join()
    assert served.most_at_once == at_once


@pytest.mark.needs("obstore")
def test_obstore_joins_no_neighbours(served: Served, server: Server) -> None:
    """A request has no more than 4 MiB: longer runs of pages are several on purpose."""
    reader = reader_of(server)
    assert fetched(reader, range(300)) == served.content[: 300 * 4096]
    assert sorted(served.asked) == [(at * 4096, (at + 1) * 4096) for at in range(300)]


@pytest.mark.needs("obstore")
@pytest.mark.parametrize("pieces", [[7], FEW, MANY])
def test_obstore_reads_one_version(pieces: Sequence[int], served: Served, server: Server) -> None:
    reader = reader_of(server)
    facts = reader.facts()
    served.etag = '"two"'
    with pytest.raises(OSError, match="has changed since") as caught:
        fetched(reader, pieces, facts)
    assert caught.value.errno == errno.ESTALE
    served.content = served.content[:4096]
    with pytest.raises(OSError, match="has changed since"):
        fetched(reader, pieces, facts)


@pytest.mark.needs("obstore")
@pytest.mark.parametrize("pieces", [FEW, MANY])
def test_a_range_that_is_refused_fails_all(
    pieces: Sequence[int], served: Served, server: Server
) -> None:
    reader = reader_of(server)
    served.refused[pieces[2] * 4096] = 404
    with pytest.raises(FileNotFoundError):
        fetched(reader, pieces)
    served.refused.clear()
    fetched(reader, pieces)


@pytest.mark.needs("fsspec")
@pytest.mark.parametrize(("failures", "retries"), [(2, 2), (2, 1)])
def test_a_file_system_is_asked_again(failures: int, retries: int, tmp_path: Path) -> None:
    """For what it says of the object too, which is asked before and after each fetch."""
    from fsspec.implementations.local import LocalFileSystem

    class Failing(LocalFileSystem):  # type: ignore[misc]
        left = 0

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            if Failing.left:
                Failing.left -= 1
                raise ConnectionResetError
            told: dict[str, Any] = super().info(path, **options)
            return told

    path = tmp_path / "object"
    path.write_bytes(b"x" * 4096)
    reader = FsspecReader(Failing(), str(path), 1, retries)
    memory = bytearray(4096)
    facts = reader.facts()
    for call in (reader.facts, lambda: reader.fetch([Range(0, memoryview(memory))], facts)):
        Failing.left = failures
        if failures > retries:
            with pytest.raises(ConnectionResetError):
                call()
        else:
            call()
    assert memory == b"x" * 4096


@pytest.mark.needs("fsspec")
def test_other_urls_are_fsspecs(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(content(range(4)).tobytes())
    with fremap.open(f"file://{path}") as store:
        np.testing.assert_array_equal(store.read([3, 0]), content([3, 0]))
        path.write_bytes(bytes(4 * PAGE))
        os.utime(path, ns=(1, 1))
        with pytest.raises(fremap.ProviderError, match="has changed since"):
            store.read(1)
    with fremap.RemoteStore(f"file://{path}", retries=0) as store:
        os.truncate(path, PAGE)
        with pytest.raises(fremap.ProviderError, match="has changed since"):
            store.read(2)
        os.truncate(path, 4 * PAGE)
    with fremap.open(f"simplecache::file://{path}") as store:
        np.testing.assert_array_equal(store.read(3), np.zeros((1, PAGE), np.uint8))
    with pytest.raises(fremap.UnsupportedError, match="in the memory of this process"):
        fremap.open("memory://x")
    with pytest.raises(fremap.UnsupportedError, match="fsspec cannot open"):
        fremap.open("nosuch://x/y")


@pytest.mark.once
@pytest.mark.needs("fsspec")
@pytest.mark.parametrize(
    ("url", "options", "error", "text"),
    [
        ("ftp://127.0.0.1:1/x", {}, fremap.StoreError, "Connection refused"),
        ("zip://x::file:///nothing/a.zip", {}, fremap.StoreNotFoundError, "No such file"),
        ("file:///nothing/x", {}, fremap.StoreNotFoundError, "No such file"),
    ],
)
def test_errors_of_packages_name_the_object(
    url: str, options: dict, error: type, text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        fremap.open(url, storage_options=options)
    assert url in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@needs_s3
@pytest.mark.once
@pytest.mark.parametrize(
    ("url", "options", "error", "text"),
    [
        ("s3://bad bucket/x", None, fremap.ArgumentError, "domain"),
        ("s3://bad bucket/x", {"anon": True}, fremap.StoreError, "Invalid bucket name"),
        ("s3://b/x", {"nosuch": 3}, fremap.ArgumentTypeError, "nosuch"),
        ("az://c/x", None, fremap.StoreError, "Account must be specified"),
    ],
)
def test_errors_of_object_stores_name_the_object(
    url: str, options: dict | None, error: type, text: str, bucket: Any
) -> None:
    with pytest.raises(error, match=text) as caught:
        fremap.open(url, storage_options=options)
    assert url in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.once
@pytest.mark.needs("fsspec")
def test_file_systems_must_be_picklable(tmp_path: Path) -> None:
    from fsspec.implementations.local import LocalFileSystem

    class Fixed(LocalFileSystem):
        def __reduce__(self) -> Any:
            raise ValueError("never")

    path = tmp_path / "object"
    path.write_bytes(bytes(10))
    with pytest.raises(fremap.ArgumentTypeError, match=rf"{path} cannot be pickled.*\(never\)"):
        fremap.open((Fixed(), str(path)))


@pytest.mark.once
def test_nothing_is_imported_before() -> None:
    code = (
        "import sys, fremap\n"
        "names = ('fsspec', 'obstore', 'http.client', 'socket', 'multiprocessing')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


# The documentation.

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = re.compile(r"^```python program\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in ("README.md", "docs/start.md", "docs/guides/remote.md", "docs/guides/computed.md")
    for number, block in enumerate(PROGRAM.findall((REPOSITORY / name).read_text()))
]


@pytest.mark.needs("paged")
@pytest.mark.parametrize("block", PROGRAMS)
def test_programs_of_the_documentation_run(block: str, server: Server, tmp_path: Path) -> None:
    server.served.content = npy_bytes(np.arange(40_000).reshape(10_000, 4))
    program = tmp_path / "program.py"
    program.write_text(block.replace("https://example.com", server.base))
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
