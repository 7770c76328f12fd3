"""What this process may do: true here, plain to read, and plain data."""

import dataclasses
import json
import os

import fremap
import pytest


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
    assert json.loads(json.dumps(found.to_dict()))["engines"]["alias"]["available"] is True
