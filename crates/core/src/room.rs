//! Allocations that can fail.
//!
//! If a `Vec` cannot allocate, Rust ends the process. So memory whose size depends on the caller's
//! numbers is allocated here, where failure is an error. Other allocations of a step have a bound
//! and a reserve ([`crate::sys::reserve`]).

use rustix::io::Errno;

use crate::error::{Error, Interrupt, Result};
use crate::memory;
use crate::sys::reserve;
use crate::sys::span::Span;
use crate::sys::zeros::Integer;
pub use crate::sys::zeros::Zeros;

/// An empty vector with room for `count` items, or an error that a caller can
/// catch: a failed allocation would end the process.
pub(crate) fn room_for<T>(operation: &'static str, count: usize) -> Result<Vec<T>> {
    let mut room: Vec<T> = Vec::new();
    room.try_reserve_exact(count).map_err(|_| no_room::<T>(operation, count))?;
    // The reserve is not for what may be refused.
    if reserve::has(room.as_ptr().cast()) {
        return Err(no_room::<T>(operation, count));
    }
    Ok(room)
}

/// All of `items`, or an error that a caller can catch.
pub(crate) fn collected<T>(
    operation: &'static str,
    items: impl IntoIterator<Item = T>,
) -> Result<Vec<T>> {
    let items = items.into_iter();
    let mut all = room_for(operation, items.size_hint().0)?;
    for item in items {
        push(operation, &mut all, item)?;
    }
    Ok(all)
}

/// The bytes of a span, or an error that a caller can catch.
///
/// # Errors
/// [`Error::Memory`].
pub fn copied(operation: &'static str, span: Span<'_>) -> Result<Vec<u8>> {
    let mut bytes = room_for(operation, span.len())?;
    bytes.resize(span.len(), 0);
    span.copy_to(&mut bytes);
    Ok(bytes)
}

/// A mask of `len` falses. It can be long: the caller can be interrupted while it is made.
pub(crate) fn mask(
    operation: &'static str,
    len: usize,
    interrupt: &dyn Interrupt,
) -> Result<Vec<bool>> {
    /// What is cleared between two questions.
    const PIECE: usize = 1 << 18;
    let mut mask = room_for(operation, len)?;
    while mask.len() < len {
        interrupt.check()?;
        mask.resize(len.min(mask.len() + PIECE), false);
    }
    Ok(mask)
}

/// Fails where a map of `len` items cannot grow by `count` of them without the reserve, which is
/// not for what may be refused. `left`: as many have room.
pub(crate) fn check_growth<T>(
    operation: &'static str,
    (len, left): (usize, usize),
    count: usize,
) -> Result<()> {
    if count > left {
        // A map is at most half as full after it has grown, and was freed before.
        drop(room_for::<T>(operation, 2 * (len + count))?);
    }
    Ok(())
}

/// Room for `count` more, or an error that a caller can catch.
pub(crate) fn grow<T>(operation: &'static str, list: &mut Vec<T>, count: usize) -> Result<()> {
    let wanted = list.len() + count;
    if wanted > list.capacity() {
        list.try_reserve(count).map_err(|_| no_room::<T>(operation, wanted))?;
        if reserve::has(list.as_ptr().cast()) {
            return Err(no_room::<T>(operation, wanted));
        }
    }
    Ok(())
}

/// Appends `item`, or fails with an error that a caller can catch.
pub(crate) fn push<T>(operation: &'static str, list: &mut Vec<T>, item: T) -> Result<()> {
    grow(operation, list, 1)?;
    list.push(item);
    Ok(())
}

/// An array of zeros, or an error that a caller can catch.
pub(crate) fn zeros<T: Integer>(operation: &'static str, len: usize) -> Result<Zeros<T>> {
    Zeros::new(len).map_err(|errno| match errno {
        Errno::NOMEM => no_room::<T>(operation, len),
        other => Error::system(operation, other),
    })
}

/// What is said where there is no room for `count` items.
pub(crate) fn no_room<T>(operation: &'static str, count: usize) -> Error {
    Error::Memory {
        operation,
        wanted: (count as u64).saturating_mul(size_of::<T>() as u64),
        available: memory::available().unwrap_or(0),
        completed: 0,
    }
}
