//! Counters of a window.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident: $doc:literal),* $(,)?) => {
        /// What a window has done so far; counted without locks.
        #[derive(Debug, Default)]
        pub struct Counters { $(#[doc = $doc] pub $name: AtomicU64),* }

        /// A window's state and what it has done so far, at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            /// Pages whose content is in the window.
            pub present_pages: u64,
            /// Pages with content of their own.
            pub placed_pages: u64,
            /// Pages that may not be touched.
            pub denied_pages: u64,
            /// Pages that are known to have been written to, and are not in the store.
            pub dirty_pages: u64,
            /// Pages that are pinned.
            pub pinned_pages: u64,
            /// Bytes of the kernel's page tables for the window, at most.
            pub page_table_bytes: u64,
            /// Bytes that the window may take; 0 without a limit, or if it fits whole.
            pub budget_bytes: u64,
            /// Bytes of the table of what each page shows.
            pub table_bytes: u64,
            /// Bytes of memory that content is read into before it is swapped in.
            pub staging_bytes: u64,
            /// Blocks of 2 MiB of the file that were unmapped to keep to the budget.
            pub blocks_trimmed: u64,
            /// How often a page became present.
            pub pages_in: u64,
            /// How often a page that was present became absent.
            pub pages_out: u64,
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
                    ("present_pages", self.present_pages),
                    ("placed_pages", self.placed_pages),
                    ("denied_pages", self.denied_pages),
                    ("dirty_pages", self.dirty_pages),
                    ("pinned_pages", self.pinned_pages),
                    ("page_table_bytes", self.page_table_bytes),
                    ("budget_bytes", self.budget_bytes),
                    ("table_bytes", self.table_bytes),
                    ("staging_bytes", self.staging_bytes),
                    ("blocks_trimmed", self.blocks_trimmed),
                    ("pages_in", self.pages_in),
                    ("pages_out", self.pages_out),
                    $((stringify!($name), self.$name)),*
                ]
            }
        }
    };
}

counters! {
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
