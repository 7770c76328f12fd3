"""Python imports this as it starts where `as_older_kernel.py` has named this folder.

Has fremap take the features of userfaultfd for missing that Linux got after 6.1.
"""

import errno
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HIDDEN = ("probe_uffdio_move", "probe_uffdio_poison", "probe_uffd_wp_async")
FOR_GOOD = 2**31


def hide(core: Any) -> None:
    """Have the questions whether the kernel has these features answered with no."""
    clear = core.clear_failures

    def hide_again() -> None:
        for name in HIDDEN:
            core.inject_failure(name, 0, errno.EINVAL, FOR_GOOD)

    def clear_failures() -> None:
        clear()
        hide_again()

    core.clear_failures = clear_failures
    hide_again()


class Finder:
    """Finds fremap's extension module once, to hide the features as soon as it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where the module is found otherwise, with a loader that hides."""
        if name != "fremap._core":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_hide(module: ModuleType) -> None:
                load(module)
                hide(module)

            spec.loader.exec_module = load_and_hide  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
