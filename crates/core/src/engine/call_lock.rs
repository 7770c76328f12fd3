//! The call lock: one call at a time, and a caller that waits for it can be interrupted.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Interrupt, Result};
use crate::sys::lock::lock;

/// How long a wait may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(25);

/// A value that one call at a time has, for as long as the call takes.
#[derive(Debug, Default)]
pub(crate) struct CallLock<T> {
    queue: Mutex<Queue>,
    ended: Condvar,
    /// Only the call that holds the lock locks it.
    value: Mutex<T>,
}

/// Whether a call is under way, and how many wait for its end.
#[derive(Debug, Default)]
struct Queue {
    taken: bool,
    waiting: usize,
}

/// A call under way; its end lets the next one go on.
pub(crate) struct CallGuard<'a, T> {
    lock: &'a CallLock<T>,
    owner: u32,
    value: MutexGuard<'a, T>,
}

impl<T> CallLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { queue: Mutex::default(), ended: Condvar::new(), value: Mutex::new(value) }
    }

    /// Waits until the calls before have ended.
    pub(crate) fn take(&self, interrupt: &dyn Interrupt) -> Result<CallGuard<'_, T>> {
        let mut queue = lock(&self.queue);
        while queue.taken {
            // Not with the lock held: asking Python can take long.
            drop(queue);
            interrupt.check()?;
            queue = lock(&self.queue);
            if queue.taken {
                queue.waiting += 1;
                let waited = self.ended.wait_timeout(queue, WAIT);
                queue = waited.unwrap_or_else(PoisonError::into_inner).0;
                queue.waiting -= 1;
            }
        }
        queue.taken = true;
        drop(queue);
        Ok(CallGuard { lock: self, owner: crate::sys::process::id(), value: lock(&self.value) })
    }
}

impl<T> Drop for CallGuard<'_, T> {
    fn drop(&mut self) {
        // A handler has forked in the middle of the call: in the child the lock is its
        // parent's, and a thread that was waiting may hold the lock forever.
        if self.owner != crate::sys::process::id() {
            return;
        }
        let mut queue = lock(&self.lock.queue);
        queue.taken = false;
        // Waking nobody is a system call too.
        if queue.waiting > 0 {
            self.lock.ended.notify_one();
        }
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
