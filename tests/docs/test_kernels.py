"""The table of kernel features is what `fremap.capabilities()` says."""

from pathlib import Path

import fremap
import pytest

pytestmark = pytest.mark.once
PAGE = Path(__file__).parents[2] / "docs/kernels.md"


def table() -> dict[str, tuple[str, str, str]]:
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if "| `" in line]
    return {
        name.strip(" `"): (since.strip(), used_for.strip(), without.strip())
        for name, since, used_for, without in rows
    }


def test_the_table_is_what_capabilities_says() -> None:
    assert table() == {
        name: (probe.since or "any", probe.used_for, probe.without)
        for name, probe in fremap.capabilities().probes.items()
    }
