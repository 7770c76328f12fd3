//! A call that names extents, from when it gets slots for them until it releases them.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

use super::table::{Given, Table};
use super::{SharedSlots, Tenure};
use crate::error::{Error, Interrupt, Result};
use crate::room::room_for;
use crate::scatter::Sink;
use crate::slot_table::{Arrival, Key, Slot, SlotCall, Stage};
use crate::store::Store;
use crate::sys::ring::DEPTH;
use crate::sys::shm::Mapping;
use crate::sys::span::Span;
use crate::units::FilePage;

/// A call that names extents in slots that processes share.
#[derive(Debug)]
pub struct SharedCall {
    shared: Arc<SharedSlots>,
    tenure: Tenure,
    /// The slot of each key, as they were named.
    slots: Vec<Slot>,
    given: Given,
    stage: AtomicU8,
}

impl SharedCall {
    pub(super) fn new(
        shared: Arc<SharedSlots>,
        tenure: Tenure,
        slots: Vec<Slot>,
        given: Given,
    ) -> Self {
        let first = if given.missing.is_empty() { Stage::Named } else { Stage::Bringing };
        Self { shared, tenure, slots, given, stage: AtomicU8::new(first as u8) }
    }

    /// Goes from one stage to another, if it is at the first.
    fn go(&self, from: Stage, to: Stage, then: impl FnOnce(&Table<'_, Mapping>)) {
        if !self.tenure.is_own() {
            return;
        }
        let (from, to) = (from as u8, to as u8);
        if self.stage.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let Some(locked) = self.shared.object.lock_anyway() else { return };
        // Whoever has left holds nothing any more.
        if self.shared.is_current(&locked, self.tenure) {
            then(&locked.table);
            if from == Stage::Bringing as u8 {
                self.shared.has_brought(&locked, self.tenure);
            }
        }
        drop(locked);
        self.shared.object.notify();
    }

    /// Reads what is missing from the store, all of it in flight together, and says what has
    /// arrived.
    ///
    /// # Errors
    /// As [`Store::scatter`], in pages; extents of which all were completed are in their slots.
    pub fn load(&self, store: &Store, interrupt: &dyn Interrupt) -> Result<()> {
        let geometry = self.shared.geometry();
        let pages = geometry.extent_pages;
        let page_count = geometry.store_bytes.div_ceil(geometry.page_bytes);
        let mut file_pages: Vec<FilePage> =
            room_for("ensure", self.given.missing.len() * pages as usize)?;
        for &(key, slot) in &self.given.missing {
            let first = key.0 * pages;
            let end = page_count.min(first + pages);
            file_pages.extend((first..end).map(FilePage));
            let within = ((end - first) * geometry.page_bytes) as usize;
            // What lies behind the store's end is the end of the last extent.
            let memory = self.shared.slot_memory(slot);
            memory.part(within, memory.len() - within).clear();
        }
        let mut sink = SlotSink { call: self, extent_pages: pages as usize };
        let outcome = store.scatter(&file_pages, &mut sink, interrupt);
        let done = match &outcome {
            Ok(()) => self.given.missing.len(),
            Err(error) => error.completed() / pages as usize,
        };
        self.settle(done);
        outcome
    }

    /// Puts what is missing into its slots: whole extents one after another, by rising keys.
    ///
    /// # Errors
    /// [`Error::Argument`] where `data` is not as long.
    pub fn fill(&self, data: Span<'_>) -> Result<()> {
        let bytes = self.shared.geometry().extent_bytes() as usize;
        let missing = &self.given.missing;
        if data.len() != bytes * missing.len() {
            return Err(Error::Argument(format!(
                "write: {} extents of {bytes} bytes are not {} bytes",
                missing.len(),
                data.len()
            )));
        }
        let store_bytes = self.shared.geometry().store_bytes;
        for (number, &(key, slot)) in missing.iter().enumerate() {
            // What lies behind the store's end was not written, and is zeros when it is read.
            let within =
                store_bytes.saturating_sub(key.0 * bytes as u64).min(bytes as u64) as usize;
            let memory = self.shared.slot_memory(slot);
            memory.part(0, within).copy_span(data.part(number * bytes, within));
            memory.part(within, bytes - within).clear();
        }
        Ok(())
    }
}

impl SlotCall for SharedCall {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn missing(&self) -> &[(Key, Slot)] {
        &self.given.missing
    }

    fn settle(&self, done: usize) {
        self.go(Stage::Bringing, Stage::Named, |table| {
            table.settle(self.tenure.owner(), &self.given.missing, done);
        });
    }

    fn wait(&self, interrupt: &dyn Interrupt) -> Result<bool> {
        let object = &self.shared.object;
        loop {
            self.shared.check_open("ensure")?;
            let locked = object.lock(interrupt)?;
            if !self.shared.is_current(&locked, self.tenure) {
                return Err(Error::Closed { operation: "ensure", what: "slot table" });
            }
            match locked.table.arrival(&self.given.distinct) {
                Arrival::Here => return Ok(true),
                Arrival::Lost => return Ok(false),
                Arrival::Coming => {}
            }
            let notice = object.must_wait(&locked);
            drop(locked);
            if !object.sleep(notice) {
                self.shared.sweep(interrupt)?;
            }
            interrupt.check()?;
        }
    }

    fn release(&self) {
        self.go(Stage::Named, Stage::Over, |table| {
            table.release(self.tenure.owner(), &self.given.distinct);
        });
    }

    fn pin(&self) {
        self.go(Stage::Named, Stage::Pinned, |table| {
            table.pin(self.tenure.owner(), &self.given.distinct);
        });
    }

    fn unpin(&self) {
        self.go(Stage::Pinned, Stage::Over, |table| {
            table.unpin(self.tenure.owner(), &self.given.distinct);
        });
    }
}

impl Drop for SharedCall {
    fn drop(&mut self) {
        self.settle(0);
        self.release();
        self.unpin();
    }
}

/// Each extent is a chunk, read into its slot.
struct SlotSink<'m> {
    call: &'m SharedCall,
    extent_pages: usize,
}

impl<'m> Sink<'m> for SlotSink<'m> {
    fn chunk_pages(&self) -> usize {
        self.extent_pages
    }

    fn chunks_in_flight(&self) -> usize {
        // Twice as many pages as are read at once.
        (2 * DEPTH).div_ceil(self.extent_pages).max(2)
    }

    fn buffer(&mut self, chunk: usize) -> Span<'m> {
        let call: &'m SharedCall = self.call;
        call.shared.slot_memory(call.given.missing[chunk].1)
    }

    fn complete(&mut self, _requests: Range<usize>) -> Result<()> {
        Ok(())
    }
}
