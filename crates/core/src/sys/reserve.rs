//! A reserve of memory for the moment in which the allocator has none.
//!
//! Rust ends the process if an allocation fails. Large allocations can fail with an error
//! ([`crate::room`]); other allocations of a call or a fault are small. [`Reserve`] is an
//! allocator that takes small allocations from static memory when the system's allocator has
//! none. So a step that has begun can end, and the call fails when it next asks for memory that
//! may be refused.
//!
//! The reserve is three sets of 64 slots. One word for each set says which slots are taken. There
//! is no lock, because a child of fork could find it locked.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

const SLOTS: usize = 64;
/// Large ones may be joined.
const SMALL_BYTES: usize = 256;
const MIDDLE_BYTES: usize = 8 << 10;
const LARGE_BYTES: usize = 128 << 10;

#[repr(C, align(4096))]
struct Slots<const BYTES: usize> {
    memory: UnsafeCell<[[u8; BYTES]; SLOTS]>,
    taken: AtomicU64,
}

// SAFETY: a slot is used by whoever has set its bit, alone.
unsafe impl<const BYTES: usize> Sync for Slots<BYTES> {}

static SMALL: Slots<SMALL_BYTES> = Slots::new();
static MIDDLE: Slots<MIDDLE_BYTES> = Slots::new();
static LARGE: Slots<LARGE_BYTES> = Slots::new();

/// The bits of `count` slots from `first` on.
fn mask(first: usize, count: usize) -> u64 {
    (u64::MAX >> (SLOTS - count)) << first
}

/// The first of `count` free slots in a row.
fn free_run(taken: u64, count: usize) -> Option<usize> {
    let starts = (1..count).fold(!taken, |free, _| free & (free >> 1));
    // What is shifted in at the top is zeros: no run goes beyond the end.
    (starts != 0).then_some(starts.trailing_zeros() as usize)
}

impl<const BYTES: usize> Slots<BYTES> {
    const fn new() -> Self {
        Self { memory: UnsafeCell::new([[0; BYTES]; SLOTS]), taken: AtomicU64::new(0) }
    }

    fn start(&self) -> *mut u8 {
        self.memory.get().cast()
    }

    fn count_of(layout: Layout) -> usize {
        layout.size().div_ceil(BYTES).max(1)
    }

    fn allocate(&self, layout: Layout) -> Option<*mut u8> {
        let count = Self::count_of(layout);
        if count > SLOTS || layout.align() > BYTES.min(4096) {
            return None;
        }
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let first = free_run(taken, count)?;
            let wanted = taken | mask(first, count);
            match self.taken.compare_exchange(taken, wanted, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(self.start().wrapping_add(first * BYTES)),
                Err(now) => taken = now,
            }
        }
    }

    /// Takes memory back, if it is of these slots.
    fn free(&self, memory: *mut u8, layout: Layout) -> bool {
        let offset = memory.addr().wrapping_sub(self.start().addr());
        if offset >= SLOTS * BYTES {
            return false;
        }
        self.taken.fetch_and(!mask(offset / BYTES, Self::count_of(layout)), Ordering::Release);
        true
    }

    fn has(&self, memory: *const u8) -> bool {
        memory.addr().wrapping_sub(self.start().addr()) < SLOTS * BYTES
    }
}

/// Whether memory is of the reserve.
#[must_use]
pub fn has(memory: *const u8) -> bool {
    SMALL.has(memory) || MIDDLE.has(memory) || LARGE.has(memory)
}

fn allocate(layout: Layout) -> *mut u8 {
    let small = || (layout.size() <= SMALL_BYTES).then(|| SMALL.allocate(layout)).flatten();
    let middle = || (layout.size() <= MIDDLE_BYTES).then(|| MIDDLE.allocate(layout)).flatten();
    let found = small().or_else(middle).or_else(|| LARGE.allocate(layout));
    found.unwrap_or(ptr::null_mut())
}

/// The system's allocator, and the reserve where that has no memory.
#[derive(Debug)]
pub struct Reserve;

// SAFETY: memory comes from the system's allocator and goes back there, or from slots, each
// given to one caller at a time: as many in a row as the layout needs, aligned as it says.
unsafe impl GlobalAlloc for Reserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let memory = unsafe { System.alloc(layout) };
        if memory.is_null() {
            return allocate(layout);
        }
        memory
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let memory = unsafe { System.alloc_zeroed(layout) };
        if !memory.is_null() {
            return memory;
        }
        let memory = allocate(layout);
        if !memory.is_null() {
            // SAFETY: the slots have as many bytes.
            unsafe { ptr::write_bytes(memory, 0, layout.size()) };
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if SMALL.free(memory, layout) || MIDDLE.free(memory, layout) || LARGE.free(memory, layout) {
            return;
        }
        // SAFETY: the caller's promise; it is not of the reserve.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !has(memory) {
            // SAFETY: the caller's promise; it is not of the reserve.
            let moved = unsafe { System.realloc(memory, layout, new_size) };
            if !moved.is_null() {
                return moved;
            }
        }
        // SAFETY: the caller promises that the size is one of a layout.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: a layout of more than no bytes, by the caller's promise.
        let moved = unsafe { self.alloc(new) };
        if !moved.is_null() {
            // SAFETY: both have as many bytes, and neither is a part of the other.
            unsafe { ptr::copy_nonoverlapping(memory, moved, layout.size().min(new_size)) };
            // SAFETY: the caller's promise.
            unsafe { self.dealloc(memory, layout) };
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 8).unwrap()
    }

    #[test]
    fn runs_of_slots_are_found_where_they_are_free() {
        assert_eq!(free_run(0, 1), Some(0));
        assert_eq!(free_run(0, 64), Some(0));
        assert_eq!(free_run(1, 64), None);
        assert_eq!(free_run(0b1011, 2), Some(4));
        assert_eq!(free_run(u64::MAX >> 1, 1), Some(63));
        assert_eq!(free_run(u64::MAX >> 1, 2), None);
        assert_eq!(free_run(u64::MAX, 1), None);
    }

    #[test]
    fn slots_are_given_once_and_taken_back() {
        static SET: Slots<256> = Slots::new();
        let mut all = Vec::new();
        while let Some(memory) = SET.allocate(layout(700)) {
            // SAFETY: it has 700 bytes.
            unsafe { ptr::write_bytes(memory, all.len() as u8, 700) };
            all.push(memory);
        }
        assert_eq!(all.len(), SLOTS / 3);
        for (number, &memory) in all.iter().enumerate() {
            // SAFETY: as above.
            assert_eq!(unsafe { *memory.wrapping_add(699) }, number as u8);
            assert!(SET.free(memory, layout(700)));
        }
        assert_eq!(SET.taken.load(Ordering::Relaxed), 0);
        assert!(SET.allocate(layout(64 * 256 + 1)).is_none());
        let elsewhere = (&raw const all).cast_mut().cast();
        assert!(!SET.free(elsewhere, layout(1)));
    }
}
