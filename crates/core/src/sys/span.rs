//! A range of raw memory that the kernel, other threads or the caller may change at any time.
//!
//! No Rust reference points into a [`Span`]. Only system calls and the copy functions of
//! [`sys`](super), which work on raw bytes, access it.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of the system's page.
#[must_use]
pub fn system_page_bytes() -> usize {
    /// Not a `Once`, which a child that is forked meanwhile would wait for: found out
    /// twice, it is the same.
    static BYTES: AtomicUsize = AtomicUsize::new(0);
    match BYTES.load(Ordering::Relaxed) {
        0 => {
            let bytes = rustix::param::page_size();
            BYTES.store(bytes, Ordering::Relaxed);
            bytes
        }
        bytes => bytes,
    }
}

/// `len` bytes of writable memory that stay mapped for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    start: *mut u8,
    len: usize,
    owner: PhantomData<&'a ()>,
}

// SAFETY: a span is an address range whose content is raw bytes; what may be
// done with it is the same on every thread.
unsafe impl Send for Span<'_> {}
// SAFETY: as above; there is no access through `&Span` but by raw copies.
unsafe impl Sync for Span<'_> {}

impl<'a> Span<'a> {
    /// The span of `len` bytes from `start`.
    ///
    /// # Safety
    /// The bytes stay mapped, readable and writable for `'a`, and no Rust
    /// reference into them is alive in `'a`.
    #[must_use]
    pub unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self { start, len, owner: PhantomData }
    }

    /// The span over a slice that is borrowed for as long.
    #[must_use]
    pub fn of(bytes: &'a mut [u8]) -> Self {
        Self { start: bytes.as_mut_ptr(), len: bytes.len(), owner: PhantomData }
    }

    /// The first address.
    #[must_use]
    pub fn start(self) -> *mut u8 {
        self.start
    }

    /// The number of bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset` of this span.
    ///
    /// # Panics
    /// If they are not within it.
    #[must_use]
    pub fn part(self, offset: usize, len: usize) -> Self {
        assert!(offset <= self.len && len <= self.len - offset, "part beyond the span");
        Self { start: self.start.wrapping_add(offset), len, owner: PhantomData }
    }

    /// Copies bytes into the front of the span.
    ///
    /// # Panics
    /// If the span is shorter.
    pub fn copy_from(self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len, "copy beyond the span");
        // SAFETY: `new` promises that the span is mapped and writable, and the
        // assertion that the bytes fit; memmove allows any overlap.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.start, bytes.len()) }
    }

    /// Copies another span of the same length into this one.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(crate) fn copy_span(self, source: Span<'_>) {
        assert_eq!(source.len, self.len, "spans of different lengths");
        // SAFETY: both are mapped by `new`'s promise; memmove allows any overlap.
        unsafe { std::ptr::copy(source.start, self.start, self.len) }
    }

    /// Copies the bytes of the span into `into`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(crate) fn copy_to(self, into: &mut [u8]) {
        assert_eq!(into.len(), self.len, "lengths differ");
        // SAFETY: `new` promises that the span is mapped; the slice is as long.
        unsafe { std::ptr::copy(self.start, into.as_mut_ptr(), self.len) }
    }

    /// Whether the span holds these bytes.
    ///
    /// # Panics
    /// If the lengths differ.
    #[must_use]
    pub fn holds(self, bytes: &[u8]) -> bool {
        assert_eq!(bytes.len(), self.len, "lengths differ");
        // SAFETY: `new` promises that the span is mapped; the slice is as long.
        unsafe { libc::memcmp(self.start.cast(), bytes.as_ptr().cast(), self.len) == 0 }
    }

    /// Whether another span of the same length holds the same bytes.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(crate) fn equals(self, other: Span<'_>) -> bool {
        assert_eq!(other.len, self.len, "spans of different lengths");
        // SAFETY: both are mapped by `new`'s promise.
        unsafe { libc::memcmp(self.start.cast(), other.start.cast(), self.len) == 0 }
    }

    /// The bytes, copied out.
    #[must_use]
    pub fn to_vec(self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `new` promises that the span is mapped; the vector is as long.
        unsafe { std::ptr::copy_nonoverlapping(self.start, bytes.as_mut_ptr(), self.len) }
        bytes
    }

    /// Sets every byte to zero.
    pub fn clear(self) {
        // SAFETY: `new` promises that the span is mapped and writable.
        unsafe { std::ptr::write_bytes(self.start, 0, self.len) }
    }
}
