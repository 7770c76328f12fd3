//! Copies from a map of a file that end in an error, not in SIGBUS, when the file is truncated
//! meanwhile.
//!
//! The copy routine is machine code with one *fixup*: if a thread faults on the routine's source,
//! the process-wide SIGBUS handler (`signal.rs`) continues the thread at the fixup, and the copy
//! returns an error. Any other SIGBUS goes to the handler that was there before. The first copy
//! installs the handler, never the loading of the library. Only x86-64 has the routine; elsewhere
//! pages are read by system calls, which cost about twice as much.

#[cfg(target_arch = "x86_64")]
mod routine;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
pub(super) use routine::fixup;

#[cfg(target_arch = "x86_64")]
use super::signal;
use super::span::Span;

/// The source of a copy could not be read: its file was cut short, or its
/// device failed. What of the destination was written is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLost;

/// The calling thread's right to copy from maps of files: while it is held,
/// SIGBUS reaches this thread and the handler is ours. Get one for each batch
/// of copies, as either may change between two.
#[derive(Debug)]
pub struct Recovery {
    /// Belongs to the thread whose signal mask was looked at.
    thread: PhantomData<*const ()>,
}

/// Whether this process can recover from SIGBUS while it copies. Installs nothing.
///
/// # Errors
/// The reason, for people.
pub fn recovery_available() -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    return signal::available();
    #[cfg(not(target_arch = "x86_64"))]
    return Err("recovery from SIGBUS is implemented only for x86-64".into());
}

impl Recovery {
    /// Installs the handler, or installs it again in front of one that replaced it.
    ///
    /// # Errors
    /// Why it cannot recover, for people: read by system calls instead.
    pub fn begin() -> Result<Self, String> {
        #[cfg(target_arch = "x86_64")]
        signal::ensure()?;
        #[cfg(not(target_arch = "x86_64"))]
        recovery_available()?;
        Ok(Self { thread: PhantomData })
    }

    /// Copies rows one after another into `into`, each fetched while those before it
    /// are copied.
    ///
    /// # Errors
    /// How many were copied before the first whose source was lost; see [`SourceLost`].
    ///
    /// # Panics
    /// If `into` is not as long as all rows.
    pub fn copy_rows(&self, copies: &mut RowCopies<'_>, into: Span<'_>) -> Result<(), usize> {
        // SAFETY: every span that was pushed is as long as a row, and lives as long as
        // `copies` by its lifetime.
        #[cfg(target_arch = "x86_64")]
        return unsafe { routine::copy_rows(&mut copies.starts, copies.row_bytes, into) };
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("there is no Recovery here, so nothing to copy {copies:?} to {into:?} with")
    }

    /// Copies `from` into `into`, past the processor's caches where the alignment
    /// allows it and `keep_cached` does not forbid it, and fetches `next`, the source
    /// of the copy after this one.
    ///
    /// # Errors
    /// [`SourceLost`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy(
        &self,
        into: Span<'_>,
        from: Span<'_>,
        next: Option<Span<'_>>,
        keep_cached: bool,
    ) -> Result<(), SourceLost> {
        assert_eq!(into.len(), from.len(), "spans of different lengths");
        #[cfg(target_arch = "x86_64")]
        return routine::copy(into, from, next, keep_cached);
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("there is no Recovery here, so nothing to copy {next:?} with, {keep_cached}")
    }

    /// Copies many bytes of `from` into `into`, past the processor's caches.
    ///
    /// # Errors
    /// [`SourceLost`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_long(&self, into: Span<'_>, from: Span<'_>) -> Result<(), SourceLost> {
        assert_eq!(into.len(), from.len(), "spans of different lengths");
        #[cfg(target_arch = "x86_64")]
        return routine::copy_long(into, from);
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("there is no Recovery here, so nothing to copy with")
    }
}

/// Rows of one size, in maps of files, to be copied one after another
/// ([`Recovery::copy_rows`]).
#[derive(Debug)]
pub struct RowCopies<'m> {
    row_bytes: usize,
    starts: Vec<*mut u8>,
    owner: PhantomData<Span<'m>>,
}

impl<'m> RowCopies<'m> {
    /// No row yet, of so many bytes.
    ///
    /// # Panics
    /// If rows have no bytes.
    #[must_use]
    pub fn new(row_bytes: usize) -> Self {
        assert!(row_bytes > 0, "rows without bytes");
        Self { row_bytes, starts: Vec::new(), owner: PhantomData }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// If the span is not as long as a row.
    #[inline]
    pub fn push(&mut self, from: Span<'m>) {
        assert!(from.len() == self.row_bytes, "a span of one row");
        self.starts.push(from.start());
    }

    /// Adds the last row once more, in the place of one that is not to be copied.
    ///
    /// # Panics
    /// If there is none.
    pub fn push_last_again(&mut self) {
        self.starts.extend_from_within(self.starts.len() - 1..);
    }

    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.starts.clear();
    }
}

impl Drop for Recovery {
    /// Orders the stores that went past the caches before whatever follows.
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        routine::fence();
    }
}
