//! A counter in front of every system call, and a way for tests to make one fail.
//!
//! Each function of [`sys`](super) passes [`enter`] before it calls the kernel. Counting costs
//! one relaxed addition. Tests and benchmarks use the counts to state the cost of an operation.
//! Tests use failures to see what is left when the n-th call of a kind fails or transfers fewer
//! bytes than requested.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

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
    ProbePopulate = "probe_madv_populate_read",
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
    Allocate = "fallocate",
    Advise = "fadvise",
    Sync = "fsync",
    Spawn = "posix_spawn",
    RingSetup = "io_uring_setup",
    RingEnter = "io_uring_enter",
    RingWriteAnswer = "io_uring_write_answer",
    SignalAction = "sigaction",
    SignalMask = "sigmask",
}

const KINDS: usize = Call::ALL.len();

static COUNTS: [AtomicU64; KINDS] = [const { AtomicU64::new(0) }; KINDS];
/// Calls of a kind left until the one that fails; negative when none is to fail.
static COUNTDOWN: [AtomicI64; KINDS] = [const { AtomicI64::new(-1) }; KINDS];
/// What it answers, as system calls do: bytes, or an error as a negative number.
static ANSWER: [AtomicI64; KINDS] = [const { AtomicI64::new(0) }; KINDS];
/// How many calls in a row fail once the countdown has run out.
static FAILURES: [AtomicI64; KINDS] = [const { AtomicI64::new(0) }; KINDS];

/// Counts a call that is about to be made.
///
/// # Errors
/// The error that a test asked for in place of the call.
#[inline]
pub(crate) fn enter(call: Call) -> Result<(), Errno> {
    enter_for(call, 0).map(|_none| ())
}

/// The same for a call that is to move `bytes`, or has moved them. Says how many it is
/// to move or to say that it has moved: all of them, or as few as a test asked for.
#[inline]
pub(crate) fn enter_for(call: Call, bytes: usize) -> Result<usize, Errno> {
    let kind = call as usize;
    COUNTS[kind].fetch_add(1, Ordering::Relaxed);
    if COUNTDOWN[kind].load(Ordering::Relaxed) < 0 {
        return Ok(bytes);
    }
    asked_for(kind).map(|most| most.min(bytes))
}

/// The most that a call may move, if it is not to fail.
#[cold]
fn asked_for(kind: usize) -> Result<usize, Errno> {
    let due = COUNTDOWN[kind]
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| (left > 0).then(|| left - 1))
        .is_err();
    if !due || COUNTDOWN[kind].load(Ordering::SeqCst) < 0 {
        return Ok(usize::MAX);
    }
    if FAILURES[kind].fetch_sub(1, Ordering::SeqCst) <= 1 {
        COUNTDOWN[kind].store(-1, Ordering::SeqCst);
    }
    let answer = ANSWER[kind].load(Ordering::SeqCst);
    usize::try_from(answer).map_err(|_negative| Errno::from_raw_os_error(-answer as i32))
}

/// How many calls of a kind this process has made.
#[must_use]
pub fn count(call: Call) -> u64 {
    COUNTS[call as usize].load(Ordering::Relaxed)
}

/// Makes `failures` calls of a kind fail with `errno`, after `skip` that are let through.
pub fn inject(call: Call, skip: u32, errno: Errno, failures: u32) {
    answer(call, skip, -i64::from(errno.raw_os_error()), failures);
}

/// Makes `times` calls of a kind move `bytes` at most, after `skip` that are let through.
/// Only a call that passes [`enter_for`] can fall short.
pub fn inject_short(call: Call, skip: u32, bytes: u32, times: u32) {
    answer(call, skip, i64::from(bytes), times);
}

fn answer(call: Call, skip: u32, answer: i64, times: u32) {
    let kind = call as usize;
    ANSWER[kind].store(answer, Ordering::SeqCst);
    FAILURES[kind].store(i64::from(times), Ordering::SeqCst);
    COUNTDOWN[kind].store(i64::from(skip), Ordering::SeqCst);
}

/// Lets every call through again.
pub fn clear() {
    for countdown in &COUNTDOWN {
        countdown.store(-1, Ordering::SeqCst);
    }
}

/// The error of a call that returns 0 or sets `errno`.
pub(super) fn check(result: i32) -> Result<(), Errno> {
    if result == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// The error of a function that returns it, or 0.
pub(super) fn answered(result: i32) -> Result<(), Errno> {
    match result {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// The kernel's error in one of the standard library's.
pub(super) fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// This thread's `errno`.
pub(super) fn last_errno() -> Errno {
    errno_of(&std::io::Error::last_os_error())
}
