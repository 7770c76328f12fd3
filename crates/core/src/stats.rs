//! Counters of a window.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! stats {
    (
        state: $($field:ident: $what:literal),* ;
        counters: $($name:ident: $doc:literal),* $(,)?
    ) => {
        /// What a window has done so far; counted without locks.
        #[derive(Debug, Default)]
        pub struct Counters { $(#[doc = $doc] pub $name: AtomicU64),* }

        /// A window's state and what it has done so far, at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $(#[doc = $what] pub $field: u64,)*
            $(#[doc = $doc] pub $name: u64),*
        }

        impl Stats {
            /// These counters with the state's fields zero.
            #[must_use]
            pub fn of(counters: &Counters) -> Self {
                Self {
                    $($name: counters.$name.load(Ordering::Relaxed),)*
                    ..Self::default()
                }
            }

            /// Every field with its name.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![
                    $((stringify!($field), self.$field),)*
                    $((stringify!($name), self.$name)),*
                ]
            }
        }
    };
}

stats! {
    state:
        present_pages: "Pages whose content is in the window.",
        placed_pages: "Pages with content of their own.",
        denied_pages: "Pages that may not be touched.",
        dirty_pages: "Pages that are known to have been written to, and are not in the store.",
        pinned_pages: "Pages that are pinned.",
        page_table_bytes: "Bytes of the kernel's page tables for the window, at most.",
        budget_bytes: "Bytes that the window may take; 0 without a limit, or if it fits whole.",
        table_bytes: "Bytes of the table of what each page shows.",
        staging_bytes: "Bytes of memory that content is read into before it is swapped in.",
        blocks_trimmed: "Blocks of 2 MiB of the file that were unmapped to keep to the budget.",
        pages_in: "How often a page became present.",
        pages_out: "How often a page that was present became absent.";
    counters:
        faults: "Lazy faults that were served.",
        pages_loaded: "Pages that calls brought into the window.",
        pages_moved: "Pages of those that were swapped in without copying.",
        pages_evicted: "Pages that were dropped from the window.",
        pages_hit: "Pages that calls were to bring and that were there.",
        bytes_read: "Bytes of the pages that calls and faults brought from the store.",
        bytes_written: "Bytes of the pages that were written to the store.",
        pages_unreadable: "Pages that could not be read when they were touched.",
}

impl Counters {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
