"""Slots beside a dict: whatever is named is there, and nothing that is pinned leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import fremap
import numpy as np
import pytest
from fremap.testing import numbered_words
from fremap.testing import strategies as pages_of
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

if TYPE_CHECKING:
    from fremap.slots import SlotsPin

pytestmark = pytest.mark.any_user

PAGES = 50


class SlotsMachine(RuleBasedStateMachine):
    """Drives slots beside what each slot must show."""

    engine: ClassVar[Any] = "eager"

    @initialize(
        extent_pages=st.integers(1, 5), slot_count=st.integers(1, 8), tail=st.integers(0, 4095)
    )
    def create(self, extent_pages: int, slot_count: int, tail: int) -> None:
        self.pages, self.slot_count = extent_pages, slot_count
        self.store = fremap.MemoryStore(PAGES * 4096 - tail, page_bytes=4096)
        self.store.write(None, numbered_words(range(PAGES)).view(np.uint8))
        self.content = self.store.read(None).tobytes()
        self.table = fremap.Slots(self.store, extent_pages, slot_count, engine=self.engine)
        self.shown: dict[int, int] = {}
        self.pins: list[tuple[SlotsPin, set[int]]] = []
        self.named = self.brought = self.left = 0

    def extent(self, key: int) -> bytes:
        size = self.pages * 4096
        return self.content[key * size : (key + 1) * size].ljust(size, b"\0")

    def pinned(self) -> set[int]:
        return set().union(*(keys for _, keys in self.pins))

    def follow(self, wanted: list[int], slots: np.ndarray) -> None:
        """Which slots are right is theirs to choose, within what must stay."""
        before = dict(self.shown)
        missing = set(wanted) - set(before.values())
        for key, slot in zip(wanted, slots.tolist(), strict=True):
            assert self.shown.get(slot, key) == key or self.shown[slot] not in wanted
            self.shown[slot] = key
        moved = {slot for slot, key in before.items() if self.shown[slot] != key}
        assert not {before[slot] for slot in moved} & (set(wanted) | self.pinned())
        assert sorted(self.shown.values()) == sorted(set(self.shown.values()))
        empty = self.slot_count - len(before)
        assert len(moved) == max(0, len(missing) - empty)
        self.named += len(wanted)
        self.brought += len(missing)
        self.left += len(moved)

    @rule(data=st.data(), pin=st.booleans())
    def name(self, data: st.DataObject, pin: bool) -> None:
        limit = self.table.extent_count
        wanted = data.draw(pages_of.page_lists(limit, max_size=12), "keys")
        spelt = data.draw(pages_of.spellings(wanted, limit), "spelt")
        if len(set(wanted) | self.pinned()) > self.slot_count:
            before = self.table.keys.tolist()
            with pytest.raises(fremap.BudgetError):
                self.table.pin(spelt) if pin else self.table.ensure(spelt)
            assert self.table.keys.tolist() == before
        elif pin:
            made = self.table.pin(spelt)
            self.follow(wanted, made.slots)
            self.pins.append((made, set(wanted)))
        else:
            self.follow(wanted, self.table.ensure(spelt))

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        if self.pins:
            pin, _ = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1), "which"))
            pin.release()

    @invariant()
    def agree(self) -> None:
        expected = [self.shown.get(slot, -1) for slot in range(self.slot_count)]
        assert self.table.keys.tolist() == expected
        memory = self.table.array(np.uint8)
        for slot, key in self.shown.items():
            assert memory[slot].tobytes() == self.extent(key)
        stats = self.table.stats()
        assert (stats.misses, stats.evictions) == (self.brought, self.left)
        assert stats.hits == self.named - self.brought
        assert stats.bytes_read == self.brought * self.table.extent_bytes
        assert (stats.filled_slots, stats.pinned_slots) == (len(self.shown), len(self.pinned()))

    def teardown(self) -> None:
        if hasattr(self, "table"):
            self.table.close()
            self.store.close()


def test_slots_do_what_a_dict_does(engine: str) -> None:
    run_state_machine_as_test(type("Machine", (SlotsMachine,), {"engine": engine}))
