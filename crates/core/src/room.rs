//! Memory that may not be there.
//!
//! A failed allocation of a vector's own ends the process. So whatever grows with the
//! numbers of a caller is made here, where it fails with an error.

use crate::error::{Error, Result};
use crate::memory;

/// An empty vector with room for `count` items, or an error that a caller can
/// catch: a failed allocation would end the process.
pub(crate) fn room_for<T>(operation: &'static str, count: usize) -> Result<Vec<T>> {
    let mut room = Vec::new();
    room.try_reserve_exact(count).map_err(|_| no_room::<T>(operation, count))?;
    Ok(room)
}

/// What is said where there is no room for `count` items.
pub(crate) fn no_room<T>(operation: &'static str, count: usize) -> Error {
    Error::Memory {
        operation,
        wanted: (count as u64).saturating_mul(size_of::<T>() as u64),
        available: memory::available().unwrap_or(0),
    }
}
