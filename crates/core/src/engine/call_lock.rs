//! One call at a time, where a caller that waits can be interrupted.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::lock;
use crate::error::{Interrupt, Result};

/// How long a wait may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(25);

/// A value that one call at a time has, for as long as the call takes.
#[derive(Debug, Default)]
pub(crate) struct CallLock<T> {
    taken: Mutex<bool>,
    ended: Condvar,
    /// Only the call that holds the lock locks it.
    value: Mutex<T>,
}

/// A call under way; its end lets the next one go on.
pub(crate) struct CallGuard<'a, T> {
    lock: &'a CallLock<T>,
    owner: u32,
    value: MutexGuard<'a, T>,
}

impl<T> CallLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { taken: Mutex::new(false), ended: Condvar::new(), value: Mutex::new(value) }
    }

    /// Waits until the calls before have ended.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::error::Error::Interrupted).
    pub(crate) fn take(&self, interrupt: &dyn Interrupt) -> Result<CallGuard<'_, T>> {
        let mut taken = lock(&self.taken);
        while *taken {
            // Not with the lock held: asking Python can take long.
            drop(taken);
            interrupt.check()?;
            taken = lock(&self.taken);
            if *taken {
                let waited = self.ended.wait_timeout(taken, WAIT);
                taken = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        *taken = true;
        drop(taken);
        Ok(CallGuard { lock: self, owner: std::process::id(), value: lock(&self.value) })
    }
}

impl<T> Drop for CallGuard<'_, T> {
    fn drop(&mut self) {
        // A handler has forked in the middle of the call: in the child the lock is its
        // parent's, and a thread that was waiting may hold the lock for ever.
        if self.owner != std::process::id() {
            return;
        }
        *lock(&self.lock.taken) = false;
        self.lock.ended.notify_one();
    }
}

impl<T> Deref for CallGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for CallGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}
