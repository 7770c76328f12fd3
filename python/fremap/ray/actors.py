"""The actors: what runs on the machines that have the rows, and how it is placed there."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fremap.arguments import absolute_path, counted
from fremap.concat_store import ConcatStore
from fremap.errors import ArgumentError, ArgumentTypeError, StoreError
from fremap.locations import is_remote
from fremap.rows import Rows
from fremap.sources import is_single, look, name_of
from fremap.stores import ProvidedStore, Store

if TYPE_CHECKING:
    from fremap.shards import Kind
    from fremap.sources import RowsSource

# What an actor has unless `actor_options` says otherwise. Its threads each hold a round at most.
_ACTOR_OPTIONS = {"num_cpus": 0, "max_concurrency": 4, "max_restarts": 3, "max_task_retries": 3}


class Opened(NamedTuple):
    """What an actor has opened: `files` says which files, for later requests to name."""

    kind: Kind
    row_count: int
    files: str
    node: str
    address: str
    process: int


class _ShardActor:
    """The rows of one machine, in a process there."""

    def __init__(self, source: RowsSource, *options: Any, **more: Any) -> None:
        self._error: Exception | None = None
        try:
            self._rows = Rows(source, *options, **more)
            self._files = _told_files(self._rows)
        except Exception as error:  # noqa: BLE001 - raised by each request
            self._error = error

    def opened(self) -> Opened:
        """Tell what was opened."""
        if self._error is not None:
            raise self._error
        return Opened(
            self._rows._kind,  # noqa: SLF001 - fremap's own
            len(self._rows),
            self._files,
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            os.getpid(),
        )

    def take(self, ids: bytes, piece_rows: int, files: str) -> Any:
        """Return rows: an array, or several pieces of so many rows where these are small."""
        if self._error is not None:
            raise self._error
        if files != self._files and not _same_elsewhere(files, self._files):
            raise StoreError(
                errno.ESTALE,
                "take: the actor was restarted, and its files are not those that the table was "
                "opened with; make the table anew",
            )
        numbers = np.frombuffer(ids, np.int64)
        row_bytes = self._rows.row_bytes
        taken = np.empty(len(numbers) * row_bytes, np.uint8)
        self._rows.take(numbers, taken)
        if not piece_rows:
            return taken
        step = piece_rows * row_bytes
        pieces = [taken[at : at + step].tobytes() for at in range(0, len(taken), step)]
        return pieces if len(pieces) > 1 else pieces[0]

    def refresh(self) -> None:
        """Forget the rows that are kept in memory."""
        if self._error is not None:
            raise self._error
        self._rows.refresh()


ShardActor = ray.remote(_ShardActor)


def _told_files(rows: Rows) -> str:
    """Return the machine, which files there are there, and how long they are, as one text.

    An object on a server is the same from everywhere: its version is with the lengths.
    """
    shards = rows._shards  # noqa: SLF001 - fremap's own
    which, sizes = [], []
    for file, identity, *lengths in shards:
        here, everywhere = _told_store(file) if isinstance(file, Store) else (identity, None)
        which.append((name_of(file), here))
        sizes.append((lengths, everywhere))
    digests = (
        hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest() for what in (which, sizes)
    )
    return " ".join((ray.get_runtime_context().get_node_id(), *digests))


def _told_store(store: Store) -> tuple[object, object]:
    """Return which file of this machine a store has, and which version of an object."""
    if isinstance(store, ConcatStore):
        here, everywhere = zip(*map(_told_store, store.stores), strict=True)
        return here, everywhere
    if isinstance(store, ProvidedStore):
        return None, getattr(store, "_facts", None)
    looked = look(f"/proc/self/fd/{store.fileno()}")  # its path may lead to another file by now
    return (looked if isinstance(looked, int) else looked[1:4]), None


def _same_elsewhere(files: str, now: str) -> bool:
    """Tell whether files are as long as those on another machine, and so may be copies of them."""
    (machine, _, sizes), (machine_now, _, sizes_now) = files.split(), now.split()
    return machine != machine_now and sizes == sizes_now


class Shard(NamedTuple):
    """An actor and the rows of the table that it has; none before it has opened its files."""

    actor: Any
    number: int
    first: int = 0
    row_count: int = 0
    files: str = ""
    node: str = ""
    address: str = ""
    process: int = 0

    @property
    def actor_id(self) -> str:
        """Ray's number of the actor."""
        return str(self.actor._actor_id.hex())  # noqa: SLF001 - there is no other way

    @property
    def name(self) -> str:
        """What messages call it."""
        if not self.node:
            return f"actor {self.number} ({self.actor_id})"
        return (
            f"actor {self.number} ({self.actor_id}, process {self.process} on node {self.address}, "
            f"{self.node})"
        )


def split(
    sources: Mapping[str, RowsSource] | Sequence[RowsSource],
) -> tuple[list[str] | None, list[RowsSource]]:
    """Return the nodes, if they are named, and what the actor on each opens."""
    if isinstance(sources, Mapping):
        nodes, each = list(sources), list(sources.values())
    elif is_single(sources) or not isinstance(sources, Sequence):
        raise ArgumentTypeError(
            "DistributedRows: sources must be a mapping of nodes to files, or a list with what "
            f"each actor opens, not {type(sources).__name__}"
        )
    else:
        nodes, each = None, list(sources)
    if not each:
        raise ArgumentError("DistributedRows: sources is empty; a table needs an actor")
    if len(each) > np.iinfo(np.uint16).max:
        raise ArgumentError(f"DistributedRows: {len(each)} actors; 65535 are the most")
    return nodes, [_absolute(source) for source in each]


def _absolute(source: Any) -> Any:
    """Return a source with its paths as they are meant here, whatever directory an actor is in."""
    if is_remote(source):
        return source
    if isinstance(source, str | bytes | os.PathLike):
        return absolute_path("DistributedRows", source)
    return [_absolute(one) for one in source] if isinstance(source, list | tuple) else source


def settings_of(
    actor_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, count: int
) -> list[dict[str, Any]]:
    """Return the options of each actor."""
    if actor_options is None or isinstance(actor_options, Mapping):
        return [{**_ACTOR_OPTIONS, **(actor_options or {})}] * count
    each: Any = actor_options
    if not isinstance(each, Sequence) or not all(isinstance(one, Mapping) for one in each):
        raise ArgumentTypeError(
            "DistributedRows: actor_options must be a mapping for all actors, or a list with a "
            "mapping for each"
        )
    if len(actor_options) != count:
        raise ArgumentError(
            f"DistributedRows: {len(actor_options)} actor_options for {counted(count, 'actor')}; "
            "give one mapping for all, or one for each"
        )
    return [{**_ACTOR_OPTIONS, **one} for one in actor_options]


def on_nodes(nodes: Sequence[str], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return options that place each actor on its node."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = ("NodeID", "NodeManagerAddress", "NodeName", "NodeManagerHostname")
    placed = []
    for wanted, setting in zip(nodes, settings, strict=True):
        if "scheduling_strategy" in setting:
            raise ArgumentError(
                "DistributedRows: actor_options has a scheduling_strategy, and sources names "
                "nodes; give one of the two"
            )
        found = [node["NodeID"] for node in alive if wanted in [node[name] for name in names]]
        if len(found) != 1:
            there = ", ".join(f"{node['NodeManagerAddress']} ({node['NodeID']})" for node in alive)
            what = f"{wanted!r} means {len(found)} nodes" if found else f"no node is {wanted!r}"
            raise ArgumentError(f"DistributedRows: {what}; give the ID of one of these: {there}")
        strategy = NodeAffinitySchedulingStrategy(found[0], soft=False)
        placed.append({**setting, "scheduling_strategy": strategy})
    return placed


def started(
    number: int,
    source: RowsSource,
    setting: Mapping[str, Any],
    said: tuple[Any, ...],
    options: Mapping[str, Any],
) -> Shard:
    """Start an actor that opens a source as it is `said`, and with these options."""
    try:
        actor = ShardActor.options(**setting).remote(source, *said, **options)
    except (TypeError, ValueError) as error:
        first = str(error).partition("\n")[0]  # it goes on for pages
        raise ArgumentError(
            f"DistributedRows: Ray cannot start actor {number} with these actor_options and "
            f"sources: {first.rstrip(':')}"
        ) from error
    return Shard(actor, number)


def numbered(shards: Sequence[Shard], found: Sequence[Opened]) -> list[Shard]:
    """Return the shards of a table with what they have opened: rows that must be alike."""
    table: list[Shard] = []
    first, kind = 0, found[0].kind
    for shard, opened in zip(shards, found, strict=True):
        table.append(Shard(shard.actor, shard.number, first, *opened[1:]))
        first += opened.row_count
        if opened.kind != kind:
            raise ArgumentError(
                f"DistributedRows: {table[-1].name} has rows of {opened.kind.element.name} "
                f"{opened.kind.row_shape}, {table[0].name} of {kind.element.name} "
                f"{kind.row_shape}; all must be alike"
            )
    return table
