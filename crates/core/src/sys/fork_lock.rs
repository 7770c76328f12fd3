//! A lock that a child of fork can always take.
//!
//! A child has one thread, so a lock that another thread of its parent held at the fork is never
//! released there. The word of a [`ForkLock`] says which process holds it, as the number of forks
//! between the first process and that one. A lock that another process holds counts as free. Its
//! value may have been changed half way, so it is replaced by the default one. Therefore the value
//! must be something that can be rebuilt: a cache, a pool, a count.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::futex::{self, Flags};

use super::fork;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and a thread sleeps until it is free.
const AWAITED: u32 = 2;
/// Bits of the word that are one of these; the others are the holder's generation.
const STATE_BITS: u32 = 2;

/// A value that one thread at a time has, and that a child of fork makes again if another
/// thread of its parent had it.
#[derive(Debug)]
pub struct ForkLock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, and one thread has one at a time.
unsafe impl<T: Send> Sync for ForkLock<T> {}

/// The lock, taken. Not to be kept while a signal handler may fork.
#[derive(Debug)]
pub struct ForkGuard<'a, T> {
    lock: &'a ForkLock<T>,
}

impl<T: Default> Default for ForkLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> ForkLock<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self { word: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }
}

impl<T: Default> ForkLock<T> {
    /// Takes the lock.
    pub fn lock(&self) -> ForkGuard<'_, T> {
        loop {
            if let Some(guard) = self.acquire(true) {
                return guard;
            }
        }
    }

    /// Takes the lock, unless another thread of this process has it.
    pub(crate) fn try_lock(&self) -> Option<ForkGuard<'_, T>> {
        self.acquire(false)
    }

    fn acquire(&self, waits: bool) -> Option<ForkGuard<'_, T>> {
        let ours = fork::generation() << STATE_BITS;
        let mut taken = ours | TAKEN;
        let mut word = FREE;
        loop {
            let free = word == FREE || word >> STATE_BITS != ours >> STATE_BITS;
            if free {
                match self.word.compare_exchange(word, taken, Ordering::Acquire, Ordering::Relaxed)
                {
                    Ok(FREE) => return Some(ForkGuard { lock: self }),
                    Ok(_left_by_a_parent) => {
                        // SAFETY: the lock is taken, and its holder does not exist here. The
                        // old value is not dropped, as it may be half of one and half of another.
                        unsafe { self.value.get().write(T::default()) };
                        return Some(ForkGuard { lock: self });
                    }
                    Err(found) => word = found,
                }
                continue;
            }
            if !waits {
                return None;
            }
            // Whoever has slept cannot know that nobody else sleeps.
            taken = ours | AWAITED;
            let asleep =
                self.word.compare_exchange(word, taken, Ordering::Relaxed, Ordering::Relaxed);
            if asleep.is_ok() {
                // Returns for other reasons too (a signal, another word): it is looked at again.
                let _looked = futex::wait(&self.word, Flags::PRIVATE, taken, None);
            }
            word = self.word.load(Ordering::Relaxed);
        }
    }
}

impl<T> Drop for ForkGuard<'_, T> {
    fn drop(&mut self) {
        let word = self.lock.word.swap(FREE, Ordering::Release);
        if word & AWAITED != 0 {
            let _woken = futex::wake(&self.lock.word, Flags::PRIVATE, 1);
        }
    }
}

impl<T> Deref for ForkGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is taken, so nobody else refers to the value.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for ForkGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and this guard is borrowed alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::forked::{in_child, End};
    use super::*;

    #[test]
    fn no_increment_is_lost() {
        let lock = ForkLock::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20_000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), 80_000);
    }

    #[test]
    fn another_thread_of_this_process_keeps_it() {
        let lock = ForkLock::new(7);
        let guard = lock.lock();
        assert!(lock.try_lock().is_none());
        drop(guard);
        assert_eq!(lock.try_lock().as_deref(), Some(&7));
    }

    #[test]
    fn a_child_makes_anew_what_a_thread_of_its_parent_held() {
        let lock = ForkLock::new(7);
        let guard = lock.lock();
        let ended = in_child(|| {
            let first = *lock.lock();
            *lock.lock() = 5;
            // A child's child finds it at rest.
            let second = in_child(|| *lock.lock());
            first + i32::from(second != End::Exit(5))
        });
        assert_eq!(ended, End::Exit(0));
        drop(guard);
        assert_eq!(*lock.lock(), 7);
        assert_eq!(in_child(|| *lock.lock()), End::Exit(7), "it was free");
    }
}
