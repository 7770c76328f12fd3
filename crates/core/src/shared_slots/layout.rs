//! The layout of the object that processes share: words of 8 bytes, except for the slots and the
//! lock.
//!
//! ```text
//! header | owners | slots' words | totals | links | buckets | ghosts | slots | holds of owner 0 | …
//! ```
//!
//! Only the *owners*, the slots' *words* and the *holds* are authoritative. The rest of the table
//! follows from them, and is rebuilt if a process has died while it changed it
//! ([`repair`](super::table::Table::repair)).

use crate::error::{Error, Result};

/// Bytes of a word.
pub const WORD: usize = size_of::<u64>();
/// Bytes of the header, which is all that an object has before it is filled. Less than any page.
pub const HEADER_BYTES: usize = 4096;
/// Processes that may use the slots at once.
pub const MOST_OWNERS: usize = 1024;
/// Bits of a slot's word that hold its key.
pub const KEY_BITS: u32 = 48;

/// "fremapsl".
pub const MAGIC: u64 = u64::from_le_bytes(*b"fremapsl");
/// Changes with the layout.
pub const VERSION: u64 = 1;

/// Words of the header.
pub mod header {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0;
    /// [`VERSION`](super::VERSION).
    pub const VERSION: usize = 1;
    /// How C libraries lay out the lock.
    pub const LOCK_LAYOUT: usize = 2;
    /// The namespaces of process numbers and times.
    pub const NAMESPACES: usize = 3;
    /// The first word of the [`Geometry`](super::Geometry).
    pub const GEOMETRY: usize = 5;
    /// When the store's files were changed last, as far as anybody knows: a hash.
    pub const CHANGED: usize = 11;
    /// A [`Stage`](super::Stage).
    pub const STAGE: usize = 12;
    /// Whether the memory behind the header is allocated.
    pub const HAS_MEMORY: usize = 13;
    /// The lock, of at most 16 words.
    pub const LOCK: usize = 16;
    /// A word of 32 bits that changes whenever a thread may be waiting for a change.
    pub const NOTICES: usize = 32;
    /// Whether a thread sleeps until it changes.
    pub const SLEEPERS: usize = 33;
    /// The slot that is looked at next when one has to make room.
    pub const HAND: usize = 40;
    /// The first of the slots that are empty and not held, counted from 1; 0 for none.
    pub const FREE: usize = 41;
    /// How many they are.
    pub const FREE_COUNT: usize = 42;
    /// Slots whose extent is there and not held.
    pub const IDLE_COUNT: usize = 43;
    /// Slots whose extent is there.
    pub const FILLED_COUNT: usize = 44;
    /// Those of them that were named once.
    pub const PROBATION_COUNT: usize = 45;
    /// Slots that are pinned.
    pub const PINNED_COUNT: usize = 46;
    /// The first of the counters.
    pub const COUNTERS: usize = 48;
}

/// What was done with the slots so far, by all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Keys that were named and were there, repeats counted.
    Hits,
    /// Extents that had to be brought.
    Misses,
    /// Extents that left for others.
    Evictions,
    /// Extents that arrived.
    Arrivals,
    /// Processes that ended without letting go.
    Deaths,
    /// Times that a process died while it changed the table.
    Repairs,
}

/// How far an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stage {
    /// It has a header, and no memory yet.
    Begun = 0,
    /// It may be used.
    Whole = 1,
    /// It has no name, or is about to lose it: whoever opened it looks for another one.
    Unnamed = 2,
}

impl Stage {
    /// The stage that a word says.
    #[must_use]
    pub fn of(word: u64) -> Option<Self> {
        [Self::Begun, Self::Whole, Self::Unnamed].into_iter().find(|&stage| stage as u64 == word)
    }
}

/// What the slots show: the same for all processes that use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages of an extent.
    pub extent_pages: u64,
    /// Slots there are.
    pub slot_count: u64,
    /// Bytes of the store.
    pub store_bytes: u64,
    /// Which store it is: a hash.
    pub store: u64,
}

impl Geometry {
    /// Words of one.
    pub const WORDS: usize = 5;

    /// As the header has it.
    #[must_use]
    pub fn words(&self) -> [u64; Self::WORDS] {
        [self.page_bytes, self.extent_pages, self.slot_count, self.store_bytes, self.store]
    }

    /// What the header says.
    #[must_use]
    pub fn of([page_bytes, extent_pages, slot_count, store_bytes, store]: [u64; 5]) -> Self {
        Self { page_bytes, extent_pages, slot_count, store_bytes, store }
    }

    /// Bytes of an extent, and of a slot.
    #[must_use]
    pub fn extent_bytes(&self) -> u64 {
        self.page_bytes * self.extent_pages
    }

    /// Extents of the store, the last perhaps cut short.
    #[must_use]
    pub fn extent_count(&self) -> u64 {
        self.store_bytes.div_ceil(self.page_bytes).div_ceil(self.extent_pages)
    }
}

/// The first word of each part, and the sizes of parts that are not words.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub slot_count: usize,
    pub extent_count: u64,
    pub owners: usize,
    pub words: usize,
    pub totals: usize,
    pub links: usize,
    pub buckets: usize,
    /// A power of two, so that a hash is cut by a mask. There are as many ghosts.
    pub bucket_count: usize,
    pub ghosts: usize,
    pub slots_offset: usize,
    pub slots_bytes: usize,
    pub holds: usize,
    pub holds_words: usize,
    pub object_bytes: usize,
}

impl Layout {
    /// The layout of an object for `geometry`, whose pages are `page_bytes` long.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such object.
    pub fn new(geometry: &Geometry, page_bytes: usize) -> Result<Self> {
        if geometry.words()[..3].contains(&0) || geometry.slot_count >= 1 << 31 {
            return Err(Error::Argument(format!(
                "Slots: {} slots of {} pages of {} bytes; there must be less than 2**31 slots, and \
                 none of these numbers is 0",
                geometry.slot_count, geometry.extent_pages, geometry.page_bytes
            )));
        }
        let whole = || {
            let slot_count = usize::try_from(geometry.slot_count).ok()?;
            let bucket_count = slot_count.checked_next_power_of_two()?;
            let owners = HEADER_BYTES / WORD;
            let words = owners + MOST_OWNERS;
            let totals = words.checked_add(slot_count)?;
            let links = totals.checked_add(slot_count)?;
            let buckets = links.checked_add(slot_count)?;
            let ghosts = buckets.checked_add(bucket_count)?;
            let end = ghosts.checked_add(bucket_count)?.checked_mul(WORD)?;
            // Slots may be aliased by whoever likes: at the store's pages, or the system's.
            let slots_offset = end.checked_next_multiple_of(page_bytes)?;
            let extent_bytes = geometry.page_bytes.checked_mul(geometry.extent_pages)?;
            let slots_bytes = usize::try_from(extent_bytes).ok()?.checked_mul(slot_count)?;
            let holds_offset = slots_offset.checked_add(slots_bytes)?;
            let row = slot_count.checked_mul(WORD)?.checked_next_multiple_of(page_bytes)?;
            let object_bytes = holds_offset.checked_add(row.checked_mul(MOST_OWNERS)?)?;
            let has_room = object_bytes < 1 << 47 && geometry.extent_count() <= 1 << KEY_BITS;
            has_room.then_some(Self {
                slot_count,
                extent_count: geometry.extent_count(),
                owners,
                words,
                totals,
                links,
                buckets,
                bucket_count,
                ghosts,
                slots_offset,
                slots_bytes,
                holds: holds_offset / WORD,
                holds_words: row / WORD,
                object_bytes,
            })
        };
        whole().ok_or_else(|| {
            Error::Argument(format!(
                "Slots: {} slots of {} pages are more than the address space has, or the store's \
                 {} extents are more than 2**{KEY_BITS}; use fewer slots, or longer extents",
                geometry.slot_count,
                geometry.extent_pages,
                geometry.extent_count()
            ))
        })
    }

    /// Bytes in front of the slots: the header and the table.
    pub fn table_bytes(&self) -> usize {
        self.slots_offset
    }

    /// Bytes that are allocated when the object is made; the holds of a process are, when it
    /// comes.
    pub fn first_bytes(&self) -> usize {
        self.slots_offset + self.slots_bytes
    }

    /// The place of an owner's holds, in bytes, and how many bytes they are.
    pub fn holds_of(&self, owner: usize) -> (u64, u64) {
        let bytes = self.holds_words * WORD;
        ((self.holds * WORD + owner * bytes) as u64, bytes as u64)
    }
}
