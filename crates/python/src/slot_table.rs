//! `SlotTable`: which extents are in the slots of a table.

use std::sync::Arc;

use fremap_core::slot_table::{Key, Occupant, SharedSlotTable, Slot, SlotCall, SlotStats};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyByteArray, PyDict};

use crate::call::run;
use crate::errors::{python, wrong_type};
use crate::selection::{answers, numbers};

/// Which extent is in which slot, and what is evicted.
#[pyclass(frozen, module = "fremap._core")]
pub struct SlotTable {
    core: Arc<SharedSlotTable>,
}

/// Slots that a call has for the extents it names.
#[pyclass(frozen, subclass, module = "fremap._core")]
pub struct Taken {
    call: Arc<dyn SlotCall>,
}

impl Taken {
    pub fn of(call: Arc<dyn SlotCall>) -> Self {
        Self { call }
    }
}

pub fn operation(name: &str) -> PyResult<&'static str> {
    match name {
        "ensure" => Ok("ensure"),
        "pin" => Ok("pin"),
        "write" => Ok("write"),
        _ => Err(wrong_type("ensure, pin or write")),
    }
}

/// Slots as int64 values.
pub fn numbers_of_slots<'py>(py: Python<'py>, slots: &[Slot]) -> PyResult<Bound<'py, PyByteArray>> {
    answers(py, slots, |slot| i64::from(slot.0).to_ne_bytes())
}

fn number_of_key(key: Key) -> [u8; 8] {
    i64::try_from(key.0).expect("a key below 2^63").to_ne_bytes()
}

/// The key of the extent in a slot, -1 for none.
pub fn key_shown(key: Option<Key>) -> [u8; 8] {
    key.map_or((-1_i64).to_ne_bytes(), number_of_key)
}

/// The key of each slot that was asked for, -1 for none, and whether it is pinned.
pub type KeysAndPins<'py> = (Bound<'py, PyByteArray>, Bound<'py, PyByteArray>);

pub fn occupants(py: Python<'_>, found: Option<Vec<Occupant>>) -> PyResult<KeysAndPins<'_>> {
    let found = found.ok_or_else(|| wrong_type("numbers of slots"))?;
    let keys = answers(py, &found, |(key, _)| key_shown(key))?;
    Ok((keys, answers(py, &found, |(_, pinned)| [u8::from(pinned)])?))
}

pub fn stats_by_name(py: Python<'_>, stats: SlotStats) -> PyResult<Bound<'_, PyDict>> {
    let fields = [
        ("hits", stats.hits),
        ("misses", stats.misses),
        ("evictions", stats.evictions),
        ("arrivals", stats.arrivals),
        ("filled_slots", stats.filled),
        ("pinned_slots", stats.pinned),
    ];
    fields.into_py_dict(py)
}

impl SlotTable {
    fn keys_of(&self, operation: &'static str, keys: &Bound<'_, PyAny>) -> PyResult<Vec<Key>> {
        let numbers = numbers(keys)?;
        self.core.keys(operation, &numbers).map_err(|error| python(keys.py(), &error))
    }
}

#[pymethods]
impl SlotTable {
    #[new]
    fn new(py: Python<'_>, slot_count: u32, extent_count: u64) -> PyResult<Self> {
        let made = SharedSlotTable::new(slot_count, extent_count);
        made.map(|table| Self { core: Arc::new(table) }).map_err(|error| python(py, &error))
    }

    /// The slots of the keys, if all are there.
    fn find<'py>(
        &self,
        py: Python<'py>,
        asked: &str,
        keys: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyByteArray>>> {
        let operation = operation(asked)?;
        let keys = self.keys_of(operation, keys)?;
        let found = self.core.find(operation, &keys).map_err(|error| python(py, &error))?;
        let Some(slots) = found else { return Ok(None) };
        numbers_of_slots(py, &slots).map(Some)
    }

    /// Slots for the keys, once there is room.
    fn reserve(&self, py: Python<'_>, asked: &str, keys: &Bound<'_, PyAny>) -> PyResult<Taken> {
        let operation = operation(asked)?;
        let keys = self.keys_of(operation, keys)?;
        let call = run(py, |interrupt| self.core.reserve(operation, &keys, interrupt))?;
        Ok(Taken::of(Arc::new(call)))
    }

    /// Forgets the extents of keys; the slots they were in stay empty until it is released.
    fn evict(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<Taken> {
        let keys = self.keys_of("evict", keys)?;
        let call = run(py, |interrupt| self.core.evict("evict", &keys, interrupt))?;
        Ok(Taken::of(Arc::new(call)))
    }

    /// The key of each slot, -1 for none.
    fn keys<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyByteArray>> {
        let keys = self.core.look("keys", fremap_core::slot_table::SlotTable::keys);
        let keys = keys.and_then(|keys| keys).map_err(|error| python(py, &error))?;
        answers(py, &keys, key_shown)
    }

    /// The key of each of these slots, -1 for none, and whether it is pinned.
    fn at<'py>(&self, py: Python<'py>, slots: &Bound<'py, PyAny>) -> PyResult<KeysAndPins<'py>> {
        let slots = numbers(slots)?;
        let found = self.core.look("slots", |table| table.at(&slots));
        occupants(py, found.and_then(|found| found).map_err(|error| python(py, &error))?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.core.look("stats", fremap_core::slot_table::SlotTable::stats);
        stats_by_name(py, stats.map_err(|error| python(py, &error))?)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.core.close());
    }
}

#[pymethods]
impl Taken {
    /// The slot of each key that was named.
    fn slots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyByteArray>> {
        numbers_of_slots(py, self.call.slots())
    }

    /// Keys and slots of the extents to load, in ascending order of keys.
    fn missing<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
        let missing = self.call.missing();
        let keys = answers(py, missing, |(key, _)| number_of_key(key))?;
        Ok((keys, answers(py, missing, |(_, slot)| i64::from(slot.0).to_ne_bytes())?))
    }

    /// The first `done` of what was missing are there, and the rest will not be.
    fn settle(&self, py: Python<'_>, done: usize) {
        py.detach(|| self.call.settle(done));
    }

    /// Waits for what others bring; false if one of them could not.
    fn wait(&self, py: Python<'_>) -> PyResult<bool> {
        run(py, |interrupt| self.call.wait(interrupt))
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| self.call.release());
    }

    fn pin(&self, py: Python<'_>) {
        py.detach(|| self.call.pin());
    }

    fn unpin(&self, py: Python<'_>) {
        py.detach(|| self.call.unpin());
    }
}
