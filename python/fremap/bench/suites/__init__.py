"""The suites: each measures some rows and returns its reports."""

from collections.abc import Callable

from fremap.bench.bench import Bench
from fremap.bench.harness import Report
from fremap.bench.suites import (
    batches,
    dirty,
    element,
    event_loop,
    fault,
    imports,
    nonblock,
    protect,
    provided,
    ray,
    read,
    remap,
    remote,
    rewrite,
    scale,
    scan,
    shards,
    slots,
    take,
    touches,
    window,
)

SUITES: dict[str, tuple[Callable[[Bench], Report], ...]] = {
    "remap": (remap.warm, remap.cold),
    "element": (element.warm,),
    "nonblock": (nonblock.populate, nonblock.half_cached),
    "protect": (protect.every_second,),
    "read": (read.present,),
    "fault": (fault.lazy, fault.linear, fault.by_signal, fault.cold),
    "dirty": (
        dirty.remap,
        dirty.first_store,
        dirty.ask,
        dirty.flush,
        dirty.flush_direct,
        dirty.evict,
    ),
    "window": (
        window.zipf_reads,
        window.zipf_writes,
        window.uniform_reads,
        window.uniform_writes,
    ),
    "slots": (slots.warm, slots.cold, slots.shared),
    "take": (
        take.warm,
        take.partly_cold,
        take.cold,
        take.in_containers,
        event_loop.beside_takes,
    ),
    "shards": (
        shards.cold,
        shards.one_cold,
        shards.warm,
        shards.long_warm,
        shards.long_cold,
        shards.threads,
        shards.opening,
    ),
    "batches": (batches.warm, batches.cold),
    "scan": (scan.warm, scan.cold, touches.warm, touches.cold, rewrite.warm),
    "scale": (scale.flat, scale.bookkeeping),
    "provided": (provided.touches, provided.reads),
    "remote": (remote.loopback, remote.distant),
    "ray": (ray.takes, ray.clients),
    "import": (imports.start,),
}

__all__ = ["SUITES"]
