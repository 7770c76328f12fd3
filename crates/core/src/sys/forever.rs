//! Values that are never dropped, behind a pointer that may be replaced.

use std::sync::atomic::{AtomicPtr, Ordering};

/// The value that a pointer of [`replace`] points to.
#[must_use]
pub fn get<T: Sync>(pointer: *mut T) -> Option<&'static T> {
    // SAFETY: pointers are null or come from `replace`, which leaks what they point to, and
    // nobody forms a reference that may change it.
    unsafe { pointer.cast_const().as_ref() }
}

/// Puts a value in place of what is at `place`, if that is still `current`. The value that is
/// replaced stays where it is: somebody may look at it.
pub fn replace<T: Sync>(place: &AtomicPtr<T>, current: *mut T, value: T) {
    let own = Box::into_raw(Box::new(value));
    if place.compare_exchange(current, own, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // SAFETY: nobody else has seen the pointer.
        drop(unsafe { Box::from_raw(own) });
    }
}
