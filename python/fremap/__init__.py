"""Scattered reads and nonlinear mappings of files larger than memory, as NumPy arrays.

- `rows` reads rows by their numbers, many at a time, from one file or thousands. Its
  `~Rows.batches` feed a training loop. `ragged` does the same for rows of unequal length.
- `memmap` is a `numpy.memmap` that stays within a memory budget; `load` and `open_memmap` make
  one from a ``.npy`` file.
- `Slots` is a cache of large extents in one array, which several processes can share.
- `Window` is contiguous memory whose pages show any pages of a store, in any order.
- `open`, `MemoryStore`, `concat` and `ComputedStore` make stores: files, objects on servers,
  shared memory, several of these, or pages that a function computes.
- `capabilities`, and the command ``fremap doctor``, say what works on this machine.

Documentation: https://fremap.github.io/fremap/

Examples
--------
>>> import fremap, numpy as np, tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     np.save(f"{folder}/table.npy", np.arange(40_000).reshape(10_000, 4))
...     with fremap.rows(f"{folder}/table.npy") as table:
...         table.take([7, 9_999, -2])[:, 0]
...     array = fremap.load(f"{folder}/table.npy", budget=64 << 20)
...     array[[7, 9_999], 1].tolist()
array([   28, 39996, 39992])
[29, 39997]
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fremap._core import __version__
from fremap.capabilities import Capabilities, EngineStatus, Probe, capabilities
from fremap.concat_store import ConcatStore, concat
from fremap.errors import (
    ActorLostError,
    ArgumentError,
    ArgumentTypeError,
    BudgetError,
    ClosedError,
    DuplicatePageError,
    ForkError,
    FormatError,
    FremapError,
    MappingLimitError,
    MemoryLimitError,
    PageRangeError,
    PlacedPageError,
    ProviderError,
    ProviderTimeoutError,
    RemapError,
    SlotsFullError,
    StoreError,
    StoreExistsError,
    StoreIsDirectoryError,
    StoreNotDirectoryError,
    StoreNotFoundError,
    StorePermissionError,
    TakeCancelledError,
    TakeTimeoutError,
    TruncatedError,
    UnsupportedError,
    ViewsAliveError,
)
from fremap.memmap import memmap
from fremap.opening import open
from fremap.protection import Prot
from fremap.rows import Rows, rows
from fremap.stores import FileStore, MemoryStore, Store
from fremap.syscall import MAP_NONBLOCK, MAP_POPULATE, remap_file_pages
from fremap.window import Window

if TYPE_CHECKING:
    from fremap import calibration
    from fremap.batches import Batches
    from fremap.computed_store import ComputedStore
    from fremap.npy import load, open_memmap
    from fremap.pending import Pending
    from fremap.ragged_rows import Ragged, RaggedRows, ragged
    from fremap.remote_store import RemoteStore
    from fremap.slots import Slots, SlotsPin
    from fremap.stats import MemmapStats, RowsStats, SlotsStats, WindowStats

# Loaded when first asked for, from these modules: half of the time that `import fremap` took.
_LATER = {
    "Batches": "batches",
    "ComputedStore": "computed_store",
    "MemmapStats": "stats",
    "Pending": "pending",
    "Ragged": "ragged_rows",
    "RaggedRows": "ragged_rows",
    "RemoteStore": "remote_store",
    "RowsStats": "stats",
    "Slots": "slots",
    "SlotsPin": "slots",
    "SlotsStats": "stats",
    "WindowStats": "stats",
    "calibration": "calibration",
    "load": "npy",
    "open_memmap": "npy",
    "ragged": "ragged_rows",
}

# Names until 0.1 and what they are now; they go with 0.2.
_RENAMED = {
    "AliasError": "DuplicatePageError",
    "Hold": "SlotsPin",
    "PageTypeError": "ArgumentTypeError",
}

__all__ = [
    "MAP_NONBLOCK",
    "MAP_POPULATE",
    "ActorLostError",
    "ArgumentError",
    "ArgumentTypeError",
    "Batches",
    "BudgetError",
    "Capabilities",
    "ClosedError",
    "ComputedStore",
    "ConcatStore",
    "DuplicatePageError",
    "EngineStatus",
    "FileStore",
    "ForkError",
    "FormatError",
    "FremapError",
    "MappingLimitError",
    "MemmapStats",
    "MemoryLimitError",
    "MemoryStore",
    "PageRangeError",
    "Pending",
    "PlacedPageError",
    "Probe",
    "Prot",
    "ProviderError",
    "ProviderTimeoutError",
    "Ragged",
    "RaggedRows",
    "RemapError",
    "RemoteStore",
    "Rows",
    "RowsStats",
    "Slots",
    "SlotsFullError",
    "SlotsPin",
    "SlotsStats",
    "Store",
    "StoreError",
    "StoreExistsError",
    "StoreIsDirectoryError",
    "StoreNotDirectoryError",
    "StoreNotFoundError",
    "StorePermissionError",
    "TakeCancelledError",
    "TakeTimeoutError",
    "TruncatedError",
    "UnsupportedError",
    "ViewsAliveError",
    "Window",
    "WindowStats",
    "__version__",
    "calibration",
    "capabilities",
    "concat",
    "load",
    "memmap",
    "open",
    "open_memmap",
    "ragged",
    "remap_file_pages",
    "rows",
]


def _renamed(name: str) -> Any:
    """Return what `name` is called now; warn once a place that uses the old name."""
    now = _RENAMED[name]
    warnings.warn(f"fremap.{name} is now called fremap.{now}", DeprecationWarning, stacklevel=3)
    return getattr(import_module("fremap"), now)


if not TYPE_CHECKING:  # or every name were there to who checks types

    def __getattr__(name: str) -> Any:
        if name in ("ray", "torch"):  # not among the others: an ImportError without that package
            return import_module(f"fremap.{name}")
        if name in _RENAMED:
            return _renamed(name)
        if name not in _LATER:
            raise AttributeError(f"module 'fremap' has no attribute {name!r}")
        module = import_module(f"fremap.{_LATER[name]}")
        value = globals()[name] = module if name == _LATER[name] else getattr(module, name)
        return value


def __dir__() -> list[str]:
    # What users may use: no modules, no imports of this file.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
