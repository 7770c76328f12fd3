//! What children of `fork` find where their parent has a window.
//!
//! Memory with `MADV_DONTFORK` is a hole in a child's address space. The child's next allocation
//! may land in it, at an address to which the child still has pointers. So before `fork` returns
//! in the child, the child maps inaccessible memory over each such range. If a range has a
//! resolver of faults ([`Resolve`](super::fault_ranges::Resolve)), it becomes empty readable
//! memory under a userfaultfd of the child, whose faults are resolved by the thread that has
//! them.
//!
//! The handler in the child only makes raw system calls, because it runs in a child of a process
//! with threads. A child made by `clone(2)` itself, or by `_Fork`, runs no handlers and keeps the
//! hole.

use std::ffi::c_void;
use std::os::fd::IntoRawFd;

use rustix::io::Errno;

use super::call::check;
use super::fault_ranges::{FaultRange, Resolve, EXPLAINED, FAULT_RANGES};
use super::fork::Handlers;
use super::{fork, signal, uffd};

/// `MAP_FIXED_NOREPLACE` (Linux 4.17); before, the address is a wish.
const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;

static HANDLERS: Handlers = Handlers { before, after, in_child };

impl FaultRange {
    /// Puts memory that nobody may touch where a child has nothing; says whether it did.
    fn fill_hole(&self) -> bool {
        let Some((start, len)) = self.range() else { return false };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: nothing that is mapped is replaced: the kernel says EEXIST (the
        // parent had not given its advice yet, or mapped something else since), or
        // before 4.17 it maps elsewhere, and that is unmapped again.
        unsafe {
            let flags = flags | MAP_FIXED_NOREPLACE;
            let mapped = libc::mmap(start, len, libc::PROT_NONE, flags, -1, 0);
            if mapped != libc::MAP_FAILED && mapped != start {
                libc::munmap(mapped, len);
            }
            mapped == start
        }
    }

    /// Has the range, which was just filled, be read through a userfaultfd of the child's own.
    fn revive(&self) -> Result<(), Errno> {
        let Some((start, len)) = self.range() else { return Ok(()) };
        let uffd = uffd::open_in_child(start, len)?;
        protect_and_keep(start, len)?;
        self.set_child_uffd(uffd.into_raw_fd());
        Ok(())
    }
}

/// Lets a range that was filled be read, but not be inherited.
fn protect_and_keep(start: *mut c_void, len: usize) -> Result<(), Errno> {
    // SAFETY: a range that `fill_hole` has mapped; first of all its own children must not
    // have it, who would find zeros there.
    unsafe {
        check(libc::madvise(start, len, libc::MADV_DONTFORK))?;
        check(libc::mprotect(start, len, libc::PROT_READ))
    }
}

fn before() {
    let mut resolvers = 0;
    for range in FAULT_RANGES.iter() {
        resolvers += usize::from(range.with_resolver(Resolve::before_fork).is_some());
    }
    if resolvers > 0 {
        signal::prepare_child();
    }
}

/// Ends what [`before`] has begun.
fn after() {
    FAULT_RANGES.iter().for_each(|range| {
        range.with_resolver(Resolve::after_fork);
    });
}

fn in_child() {
    EXPLAINED.iter().for_each(FaultRange::begin_child);
    let mut revived = false;
    for range in FAULT_RANGES.iter() {
        range.begin_child();
        if range.fill_hole() && range.with_resolver(|_| ()).is_some() {
            // Where that fails the range stays what nobody may touch.
            revived |= range.revive().is_ok();
        }
    }
    if revived {
        signal::install_in_child();
    }
}

/// Has forks call the handlers.
///
/// # Errors
/// ENOMEM when they cannot be registered.
pub(super) fn handle_forks() -> Result<(), Errno> {
    fork::handle(&HANDLERS)
}

/// A range that stays empty in children, as long as this lives.
#[derive(Debug)]
pub(super) struct Kept {
    range: &'static FaultRange,
    owner: u32,
}

impl Kept {
    /// Keeps a range that the caller is about to give `MADV_DONTFORK`.
    ///
    /// # Errors
    /// ENOMEM when the handlers cannot be registered.
    pub(super) fn new(start: *mut c_void, len: usize) -> Result<Self, Errno> {
        handle_forks()?;
        Ok(Self { range: FAULT_RANGES.take(start, len), owner: crate::sys::process::id() })
    }

    pub(super) fn range(&self) -> &'static FaultRange {
        self.range
    }

    /// Whether this process has the memory, and not the empty range.
    pub(super) fn is_own(&self) -> bool {
        self.owner == crate::sys::process::id()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // In a child the range stays as it is, for those who still point into it,
        // and its own children inherit it like any mapping.
        if self.is_own() {
            FAULT_RANGES.free(self.range);
        }
    }
}
