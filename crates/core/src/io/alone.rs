//! Single reads outside of a transfer: the rest of a short read, or a file that changes.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::sys::file::{facts, read_unchanged, Facts};
use crate::sys::span::Span;

/// Whether a file still has the bytes before `end`, and has not changed since `began_ns`. A read
/// beside a truncation may bring zeros and a full count, so what came of another is read again.
pub(crate) fn is_unchanged(fd: BorrowedFd<'_>, end: u64, began_ns: i64) -> bool {
    facts(fd).is_ok_and(|facts| facts.size_bytes >= end && facts.changed_ns < began_ns)
}

/// Reads bytes until the file did not change meanwhile; says how many came, and what the file is
/// after that. Memory that the kernel cannot reach (a window's) is filled through a buffer.
///
/// # Errors
/// The kernel's own; ENOMEM for want of a buffer.
pub(crate) fn read_alone(
    fd: BorrowedFd<'_>,
    into: Span<'_>,
    offset: u64,
) -> Result<(usize, Facts), Errno> {
    match read_unchanged(fd, into, offset) {
        Err(Errno::FAULT) => {
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(into.len()).map_err(|_full| Errno::NOMEM)?;
            buffer.resize(into.len(), 0);
            let read = read_unchanged(fd, Span::of(&mut buffer), offset)?;
            into.copy_from(&buffer);
            Ok(read)
        }
        read => read,
    }
}
