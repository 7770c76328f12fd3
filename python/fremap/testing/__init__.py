"""What fremap is tested with, for tests of your own.

- `ModelStore`, `ModelWindow`: the oracle, a store and a window in plain Python.
- `numbered_words` and friends: pages whose every word says where it belongs.
- `failures`, `short_writes`, `counting`, `system_calls`: system calls counted, and made to
  fail or to fall short.
- `kernel_reads`, `kernel_writes`: whether memory may be touched, without a signal.
- `pages_taken`: whether the kernel may have unmapped pages of files meanwhile.
- `fremap.testing.strategies`, `fremap.testing.machine`, `fremap.testing.kinds`:
  Hypothesis strategies, the state machine that drives a window beside the model, and
  that machine on each kind of store; these need `hypothesis`.
"""

from fremap.testing.kernel import Calls, counting, failures, short_writes, system_calls
from fremap.testing.model import NO_PAGE, PLACED, ModelWindow
from fremap.testing.model_store import ModelStore
from fremap.testing.pages import (
    numbered_page,
    numbered_words,
    page_numbers,
    wait_until_settled,
    write_numbered_file,
)
from fremap.testing.touch import kernel_reads, kernel_writes, pages_taken

__all__ = [
    "NO_PAGE",
    "PLACED",
    "Calls",
    "ModelStore",
    "ModelWindow",
    "counting",
    "failures",
    "kernel_reads",
    "kernel_writes",
    "numbered_page",
    "numbered_words",
    "page_numbers",
    "pages_taken",
    "short_writes",
    "system_calls",
    "wait_until_settled",
    "write_numbered_file",
]
