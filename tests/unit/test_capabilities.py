"""What this process may do: true here, plain to read, and plain data."""

import dataclasses
import errno
import json
import os
import platform
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import fremap
import pytest
from fremap import _core


def test_it_is_a_frozen_tree() -> None:
    found = fremap.capabilities()
    assert found.kernel == os.uname().release
    assert set(found.engines) == {"alias", "paged", "eager"}
    for frozen, field in [
        (found, "chosen"),
        (next(iter(found.probes.values())), "available"),
        (found.engines["alias"], "available"),
    ]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field, None)
    with pytest.raises(TypeError):
        found.engines["more"] = found.engines["alias"]


def test_engines_work_where_it_says_so() -> None:
    found = fremap.capabilities()
    with fremap.MemoryStore(1 << 16) as store:
        for name, engine in found.engines.items():
            if engine.available:
                with fremap.Window(store, engine=name, populate=True) as window:
                    assert window.engine == name
            else:
                assert engine.detail
                with pytest.raises(fremap.UnsupportedError) as raised:
                    fremap.Window(store, engine=name)
                assert str(raised.value) == f"Window: {engine.detail}"
        with fremap.Window(store) as window:
            assert window.engine == found.chosen
        assert found.reason


def test_what_is_missing_has_a_remedy() -> None:
    for probe in fremap.capabilities().probes.values():
        assert probe.detail
        assert probe.available or probe.remedy


def test_it_reads_well() -> None:
    found = fremap.capabilities()
    text = str(found)
    for name in [*found.engines, *found.probes]:
        assert f" {name} " in text or f" {name}\n" in text
    assert found.chosen in text
    assert max(map(len, text.splitlines())) <= 100


def test_it_is_plain_data() -> None:
    found = fremap.capabilities()
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == found.chosen


@pytest.fixture
def refuse() -> Iterator[Callable[[str, int], None]]:
    """Have the kernel refuse each call of a kind, as older ones and filters do."""
    yield lambda call, number: _core.inject_failure(call, 0, number, 1_000_000)
    _core.clear_failures()


def test_no_kernel_is_advised_that_this_one_exceeds(refuse: Callable[[str, int], None]) -> None:
    running = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    for call in ("userfaultfd", "process_madvise", "io_uring_setup", "cachestat", "madvise"):
        refuse(call, errno.EPERM)
    found = fremap.capabilities()
    texts = [probe.remedy for probe in found.probes.values()]
    texts += [engine.detail for engine in found.engines.values()]
    for text in texts:
        for advised in re.findall(r"Linux (\d+)\.(\d+)", text):
            assert tuple(map(int, advised)) > running, text


def test_what_comes_with_userfaultfd_says_so(refuse: Callable[[str, int], None]) -> None:
    refuse("userfaultfd", errno.EPERM)
    found = fremap.capabilities()
    assert not found.engines["paged"].available
    # Engine "alias" and memmaps keep to theirs without it.
    assert found.auto_budget_bytes == found.available_bytes // 2
    assert "without a budget" in found.probes["userfaultfd"].without
    text = str(found)
    assert text.count("comes with userfaultfd") == 5
    for name, probe in found.probes.items():
        if name.startswith("uffd_"):
            assert probe.remedy.startswith("comes with userfaultfd")


def test_missing_parts_of_userfaultfd_are_not_its_lack(
    refuse: Callable[[str, int], None],
) -> None:
    if not fremap.capabilities().engines["paged"].available:
        skipped = fremap.capabilities().probes["uffd_move"]
        assert skipped.remedy.startswith("comes with")
        return
    refuse("probe_uffdio_move", errno.EINVAL)
    found = fremap.capabilities()
    assert found.probes["uffd_move"].detail == "this kernel does not have it"
    assert "copies pages" in found.reason
    assert "swaps" not in found.reason


def test_versions_and_limits_are_told() -> None:
    found = fremap.capabilities()
    assert (found.version, found.python) == (fremap.__version__, platform.python_version())
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert found.limits["RLIMIT_NOFILE"] == soft
    assert found.available_bytes is not None
    head, *rest = str(found).splitlines()
    assert fremap.__version__ in head
    assert platform.python_version() in head
    assert any(line.split()[:1] == ["RLIMIT_NOFILE"] for line in rest)


def test_residency_fails_with_its_cause(refuse: Callable[[str, int], None], tmp_path: Path) -> None:
    """A file that cannot be mapped, before `cachestat` came: the map's failure is the cause."""
    (tmp_path / "file").write_bytes(bytes(8192))
    with fremap.open(tmp_path / "file") as store:
        refuse("mmap", errno.ENODEV)
        refuse("cachestat", errno.ENOSYS)
        with pytest.raises(fremap.StoreError) as raised:
            store.resident()
        assert raised.value.errno == errno.ENODEV


@pytest.mark.needs("paged")
def test_the_limit_of_mappings_is_named_without_poison(refuse: Callable[[str, int], None]) -> None:
    """Before Linux 6.6 each run of pages without access is a mapping."""
    pages = fremap.capabilities().max_map_count
    refuse("probe_uffdio_poison", errno.EINVAL)
    with (
        fremap.MemoryStore(pages * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine="paged") as window,
        pytest.raises(fremap.MappingLimitError, match=r"vm\.max_map_count"),
    ):
        window.protect(range(0, pages, 2), fremap.Prot.NONE)
