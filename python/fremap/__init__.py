"""Nonlinear file mappings: one window of memory, any pages of a file, in any order.

`open` or `MemoryStore` make a store of pages, `concat` makes one of several;
`Window` shows its pages in one contiguous range of memory, remapped page by page
without a kernel mapping a piece.

Examples
--------
>>> import fremap
>>> store = fremap.MemoryStore(3 * 4096, page_bytes=4096)
>>> store.write([0, 1, 2], b"a" * 4096 + b"b" * 4096 + b"c" * 4096)
>>> with store, fremap.Window(store) as window:
...     here = window.remap([2, 1, 0])
...     bytes(window.pages[:, 0])
b'cba'
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fremap._core import __version__
from fremap.capabilities import Capabilities, EngineStatus, Probe, capabilities
from fremap.concat_store import ConcatStore, concat
from fremap.errors import (
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
    RemapError,
    SlotsFullError,
    StoreError,
    StoreExistsError,
    StoreIsDirectoryError,
    StoreNotDirectoryError,
    StoreNotFoundError,
    StorePermissionError,
    TruncatedError,
    UnsupportedError,
    ViewsAliveError,
)
from fremap.memmap import memmap
from fremap.protection import Prot
from fremap.rows import Rows, rows
from fremap.stores import FileStore, MemoryStore, Store, open
from fremap.syscall import MAP_NONBLOCK, MAP_POPULATE, remap_file_pages
from fremap.window import Window

if TYPE_CHECKING:
    from fremap import calibration
    from fremap.batches import Batches
    from fremap.npy import load, open_memmap
    from fremap.ragged_rows import Ragged, RaggedRows, ragged
    from fremap.slots import Slots, SlotsPin
    from fremap.stats import MemmapStats, RowsStats, SlotsStats, WindowStats

# Loaded when first asked for, from these modules: half of the time that `import fremap` took.
_LATER = {
    "Batches": "batches",
    "MemmapStats": "stats",
    "Ragged": "ragged_rows",
    "RaggedRows": "ragged_rows",
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
    "ArgumentError",
    "ArgumentTypeError",
    "Batches",
    "BudgetError",
    "Capabilities",
    "ClosedError",
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
    "PlacedPageError",
    "Probe",
    "Prot",
    "Ragged",
    "RaggedRows",
    "RemapError",
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
    warnings.warn(f"fremap.{name} is fremap.{now} now", DeprecationWarning, stacklevel=3)
    return getattr(import_module("fremap"), now)


if not TYPE_CHECKING:  # or every name were there to who checks types

    def __getattr__(name: str) -> Any:
        if name == "torch":  # not among the others: without PyTorch it is an ImportError
            return import_module("fremap.torch")
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
