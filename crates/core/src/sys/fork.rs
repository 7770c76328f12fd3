//! What has to be done around a `fork`: the lock that excludes forks, the number of forks, and the
//! `pthread_atfork` handlers.

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use rustix::io::Errno;

use super::call::answered;
use super::lock::{Guard, Lock};
use super::thread::{block_all_signals, set_signal_mask};

/// What a module above this one does around a fork: nothing that allocates or waits for a
/// lock, save in `before`.
#[derive(Debug)]
pub(super) struct Handlers {
    /// In the parent, before it; no other fork is under way.
    pub before: fn(),
    /// In the parent and in the child, after it.
    pub after: fn(),
    /// In the child, after that.
    pub in_child: fn(),
}

static HANDLERS: AtomicPtr<Handlers> = AtomicPtr::new(null_mut());

/// Held while a fork is under way, and by who changes what it takes and lets go. The mask
/// of the thread that forks: it has every signal blocked, as it has taken locks.
static FORKING: Lock<Option<libc::sigset_t>> = Lock::new(None);

/// Forks between the first process and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// How many forks there were between the first process and this one, of those that run
/// handlers.
pub(crate) fn generation() -> u32 {
    // Fails only for want of memory, and is tried again by the next caller.
    let _registered = register();
    GENERATION.load(Ordering::Relaxed)
}

/// No thread can fork until the guard is dropped.
pub(crate) fn exclude() -> Guard<'static, Option<libc::sigset_t>> {
    FORKING.lock()
}

/// Has forks call `handlers`, which are the same for every caller.
///
/// # Errors
/// ENOMEM.
pub(super) fn handle(handlers: &'static Handlers) -> Result<(), Errno> {
    HANDLERS.store(std::ptr::from_ref(handlers).cast_mut(), Ordering::Release);
    register()
}

fn handlers() -> Option<&'static Handlers> {
    // SAFETY: null, or what `handle` was given, which lives forever.
    unsafe { HANDLERS.load(Ordering::Acquire).as_ref() }
}

thread_local! {
    /// Whether this thread is between [`before`] and [`end`]: the handlers may be registered
    /// twice, and the first call of each counts.
    static FORKS: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn before() {
    if FORKS.replace(true) {
        return;
    }
    let mask = block_all_signals().ok();
    let mut forking = FORKING.lock();
    *forking = mask;
    forking.leave();
    if let Some(handlers) = handlers() {
        (handlers.before)();
    }
}

fn end() {
    let mut forking = FORKING.resume();
    let mask = forking.take();
    drop(forking);
    if let Some(mask) = mask {
        let _restored = set_signal_mask(&mask);
    }
}

extern "C" fn in_parent() {
    if !FORKS.replace(false) {
        return;
    }
    if let Some(handlers) = handlers() {
        (handlers.after)();
    }
    end();
}

extern "C" fn in_child() {
    if !FORKS.replace(false) {
        return;
    }
    GENERATION.fetch_add(1, Ordering::Relaxed);
    if let Some(handlers) = handlers() {
        (handlers.after)();
        (handlers.in_child)();
    }
    end();
}

/// Has forks call the handlers.
fn register() -> Result<(), Errno> {
    // Not a `Once`: a child that is forked while another thread is in it would
    // wait forever. Registered twice, the handlers do nothing the second time.
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if REGISTERED.load(Ordering::Acquire) {
        return Ok(());
    }
    // SAFETY: the handlers do what may be done around a fork, and this library is never
    // unloaded.
    answered(unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) })?;
    REGISTERED.store(true, Ordering::Release);
    Ok(())
}
