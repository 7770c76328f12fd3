//! A lock that a signal handler may take, and that is free or whole in a child of fork.
//!
//! A thread that waits for a page in a signal handler must not hold this lock itself. So where
//! handlers take it ([`Lock::held_without_signals`]), its holder has all signals blocked and does
//! nothing that faults. Locking, waiting and unlocking are atomics and `futex(2)`: nothing is
//! allocated, and no other lock is taken.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::thread::futex::{self, Flags, Timespec};

use super::thread::{block_all_signals, set_signal_mask};

/// Locks, whether or not a thread panicked while it held the lock: every state behind one of our
/// locks is valid between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and a thread sleeps until it is free.
const AWAITED: u32 = 2;
/// How often a taken lock is looked at before its taker sleeps.
const SPINS: u32 = 100;

/// A value that one thread at a time has.
#[derive(Debug)]
pub struct Lock<T> {
    word: AtomicU32,
    /// Counts [`notify_all`](Self::notify_all), for those who sleep in [`wait`](Self::wait).
    notices: AtomicU32,
    sleepers: AtomicU32,
    without_signals: bool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, and one thread has one at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

/// The lock, taken.
#[derive(Debug)]
pub struct Guard<'a, T> {
    lock: &'a Lock<T>,
    /// What was blocked before, where it has to be put back.
    mask: Option<libc::sigset_t>,
    /// The mask is the thread's.
    thread: std::marker::PhantomData<*const ()>,
}

impl<T> Lock<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self {
            word: AtomicU32::new(FREE),
            notices: AtomicU32::new(0),
            sleepers: AtomicU32::new(0),
            without_signals: false,
            value: UnsafeCell::new(value),
        }
    }

    /// The same lock, which signal handlers take too.
    #[must_use]
    pub(crate) fn held_without_signals(mut self) -> Self {
        self.without_signals = true;
        self
    }

    /// Takes the lock.
    pub fn lock(&self) -> Guard<'_, T> {
        // Blocking fails for no reason that a valid set could give.
        let mask = if self.without_signals { block_all_signals().ok() } else { None };
        self.acquire();
        Guard { lock: self, mask, thread: std::marker::PhantomData }
    }

    /// Takes the lock in a signal handler that has every signal blocked.
    pub(crate) fn lock_in_handler(&self) -> Guard<'_, T> {
        self.acquire();
        Guard { lock: self, mask: None, thread: std::marker::PhantomData }
    }

    /// The guard of a lock that this thread has [left](Guard::leave) taken, or in a child
    /// of fork the thread that forked.
    ///
    /// # Panics
    /// If it is free.
    pub(crate) fn resume(&self) -> Guard<'_, T> {
        assert_ne!(self.word.load(Ordering::Relaxed), FREE, "a lock that was left taken");
        Guard { lock: self, mask: None, thread: std::marker::PhantomData }
    }

    fn acquire(&self) {
        for _ in 0..SPINS {
            if self.try_take(TAKEN) {
                return;
            }
            std::hint::spin_loop();
        }
        while self.word.swap(AWAITED, Ordering::Acquire) != FREE {
            // Returns for other reasons too (a signal, another word): it is looked at again.
            let _looked = futex::wait(&self.word, Flags::PRIVATE, AWAITED, None);
        }
    }

    fn try_take(&self, word: u32) -> bool {
        self.word.compare_exchange(FREE, word, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    fn release(&self) {
        if self.word.swap(FREE, Ordering::Release) == AWAITED {
            let _woken = futex::wake(&self.word, Flags::PRIVATE, 1);
        }
    }

    /// Lets go of the lock until [`notify_all`](Self::notify_all), or for `timeout`, and
    /// takes it again. May return sooner.
    pub fn wait<'a>(&'a self, guard: Guard<'a, T>, timeout: Option<Duration>) -> Guard<'a, T> {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let seen = self.notices.load(Ordering::SeqCst);
        // What a handler has blocked stays so while it waits.
        let in_handler = self.without_signals && guard.mask.is_none();
        drop(guard);
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let _slept = futex::wait(&self.notices, Flags::PRIVATE, seen, timeout.as_ref());
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        if in_handler {
            self.lock_in_handler()
        } else {
            self.lock()
        }
    }

    /// Ends every [`wait`](Self::wait).
    pub(crate) fn notify_all(&self) {
        self.notices.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _woken = futex::wake(&self.notices, Flags::PRIVATE, i32::MAX as u32);
        }
    }
}

impl<T> Guard<'_, T> {
    /// Leaves the lock taken, to be [resumed](Lock::resume).
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.release();
        if let Some(mask) = &self.mask {
            // Fails for no reason that a mask of the thread's own could give.
            let _restored = set_signal_mask(mask);
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is taken, so nobody else refers to the value.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and this guard is borrowed alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks_interrupts() -> bool {
        // SAFETY: sigset_t is plain data; no new mask is given, and the kernel fills this one.
        unsafe {
            let mut mask = std::mem::zeroed::<libc::sigset_t>();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
            libc::sigismember(&raw const mask, libc::SIGINT) == 1
        }
    }

    #[test]
    fn no_increment_is_lost() {
        let lock = Lock::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), 80_000);
    }

    #[test]
    fn signals_are_blocked_while_it_is_held_and_not_after() {
        let lock = Lock::new(()).held_without_signals();
        assert!(!blocks_interrupts());
        let guard = lock.lock();
        assert!(blocks_interrupts());
        let guard = lock.wait(guard, Some(Duration::from_millis(1)));
        assert!(blocks_interrupts());
        drop(guard);
        assert!(!blocks_interrupts());
        let plain = Lock::new(());
        let _guard = plain.lock();
        assert!(!blocks_interrupts());
    }

    #[test]
    fn who_waits_is_told() {
        let lock = Lock::new(0_u32);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut value = lock.lock();
                    while *value == 0 {
                        value = lock.wait(value, None);
                    }
                    *value += 1;
                });
            }
            std::thread::sleep(Duration::from_millis(5));
            *lock.lock() = 1;
            lock.notify_all();
        });
        assert_eq!(*lock.lock(), 4);
    }

    #[test]
    fn a_wait_ends_by_itself() {
        let lock = Lock::new(7);
        let guard = lock.lock();
        let guard = lock.wait(guard, Some(Duration::from_millis(1)));
        assert_eq!(*guard, 7);
    }
}
