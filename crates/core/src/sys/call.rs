//! A counter in front of every system call, and a way for tests to make one fail.
//!
//! Each function of [`sys`](super) passes [`enter`] before it calls the kernel.
//! Counting costs one relaxed addition. Counts are how tests and benchmarks
//! state the price of an operation; failures are how tests see what is left
//! when the n-th call of a kind goes wrong.

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};

use rustix::io::Errno;

macro_rules! calls {
    ($($variant:ident = $name:literal),* $(,)?) => {
        /// The kinds of system call that fremap makes, and the questions whether the
        /// kernel has one; a question that fails is answered with no. An `answer` is
        /// what the kernel says of a call that it has carried out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Call { $(#[doc = concat!("`", $name, "`")] $variant),* }

        impl Call {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in tests and counters.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
        }
    };
}

calls! {
    Mmap = "mmap",
    Munmap = "munmap",
    Mremap = "mremap",
    Mprotect = "mprotect",
    Madvise = "madvise",
    ProcessMadvise = "process_madvise",
    Mlock = "mlock",
    Mincore = "mincore",
    Msync = "msync",
    Cachestat = "cachestat",
    RemapFilePages = "remap_file_pages",
    UffdOpen = "userfaultfd",
    ProbeMove = "probe_uffdio_move",
    ProbePoison = "probe_uffdio_poison",
    ProbeWriteProtect = "probe_uffdio_writeprotect",
    ProbeAsync = "probe_uffd_wp_async",
    UffdRegister = "uffdio_register",
    UffdCopy = "uffdio_copy",
    UffdMove = "uffdio_move",
    UffdMoveAnswer = "uffdio_move_answer",
    UffdPoison = "uffdio_poison",
    UffdWriteProtect = "uffdio_writeprotect",
    PagemapScan = "pagemap_scan",
    UffdWake = "uffdio_wake",
    UffdRead = "uffd_read",
    Open = "open",
    Stat = "stat",
    Read = "read",
    Write = "write",
    Truncate = "ftruncate",
    Advise = "fadvise",
    Sync = "fsync",
    RingSetup = "io_uring_setup",
    RingEnter = "io_uring_enter",
    SignalAction = "sigaction",
    SignalMask = "sigmask",
}

const KINDS: usize = Call::ALL.len();

static COUNTS: [AtomicU64; KINDS] = [const { AtomicU64::new(0) }; KINDS];
/// Calls of a kind left until the one that fails; negative when none is to fail.
static COUNTDOWN: [AtomicI64; KINDS] = [const { AtomicI64::new(-1) }; KINDS];
static ERRNO: [AtomicI32; KINDS] = [const { AtomicI32::new(0) }; KINDS];
/// How many calls in a row fail once the countdown has run out.
static FAILURES: [AtomicI64; KINDS] = [const { AtomicI64::new(0) }; KINDS];

/// Counts a call that is about to be made.
///
/// # Errors
/// The error that a test asked for in place of the call.
#[inline]
pub fn enter(call: Call) -> Result<(), Errno> {
    let kind = call as usize;
    COUNTS[kind].fetch_add(1, Ordering::Relaxed);
    if COUNTDOWN[kind].load(Ordering::Relaxed) < 0 {
        return Ok(());
    }
    fail_if_due(kind)
}

#[cold]
fn fail_if_due(kind: usize) -> Result<(), Errno> {
    let due = COUNTDOWN[kind]
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| (left > 0).then(|| left - 1))
        .is_err();
    if !due || COUNTDOWN[kind].load(Ordering::SeqCst) < 0 {
        return Ok(());
    }
    if FAILURES[kind].fetch_sub(1, Ordering::SeqCst) <= 1 {
        COUNTDOWN[kind].store(-1, Ordering::SeqCst);
    }
    Err(Errno::from_raw_os_error(ERRNO[kind].load(Ordering::SeqCst)))
}

/// How many calls of a kind this process has made.
#[must_use]
pub fn count(call: Call) -> u64 {
    COUNTS[call as usize].load(Ordering::Relaxed)
}

/// Makes `failures` calls of a kind fail with `errno`, after `skip` that are let through.
pub fn inject(call: Call, skip: u32, errno: Errno, failures: u32) {
    let kind = call as usize;
    ERRNO[kind].store(errno.raw_os_error(), Ordering::SeqCst);
    FAILURES[kind].store(i64::from(failures), Ordering::SeqCst);
    COUNTDOWN[kind].store(i64::from(skip), Ordering::SeqCst);
}

/// Lets every call through again.
pub fn clear() {
    for countdown in &COUNTDOWN {
        countdown.store(-1, Ordering::SeqCst);
    }
}
