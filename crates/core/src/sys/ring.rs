//! Reads and writes in flight together: a queue of requests, and its implementation by a ring
//! (`io_uring`, Linux 5.11 and later).
//!
//! The kernel uses the memory of a request until it completes. So a ring is only available within a
//! closure ([`Ring::session`]), which waits for everything in flight before it returns, however it
//! ends.

mod caller;
mod pool;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{opcode, squeue, IoUring};
use rustix::io::Errno;

use super::call::{enter, enter_for, errno_of, Call};
use super::file::{read_parts_at, write_parts_at, Parts};
use super::fork_lock::ForkLock;

pub use caller::Caller;
use pool::with_threads;

/// Requests that a ring has in flight at most. Beyond it devices gain nothing.
pub const DEPTH: usize = 128;
/// Idle rings that a pool keeps: one for each thread of a program that reads in many.
const MAX_IDLE: usize = 32;
/// How often the kernel's EAGAIN and EBUSY are answered by trying again.
const AGAIN_LIMIT: u32 = 64;

/// Which way the bytes of a request go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

/// A read or a write: bytes of a file from `offset_bytes` on, and `parts`.
#[derive(Debug)]
pub struct Submission<'m, T> {
    /// What the caller wants to know of it when it has ended.
    pub tag: T,
    /// Which of the two.
    pub direction: Direction,
    /// The file, which stays open until then.
    pub file: Arc<OwnedFd>,
    /// Where in the file.
    pub offset_bytes: u64,
    /// Where in memory.
    pub parts: Parts<'m>,
}

impl<T> Submission<'_, T> {
    /// Carries it out here and now, by one `preadv` or `pwritev`.
    ///
    /// # Errors
    /// As [`read_parts_at`] and [`write_parts_at`].
    pub(crate) fn carry_out(&self) -> Result<usize, Errno> {
        match self.direction {
            Direction::Read => read_parts_at(self.file.as_fd(), &self.parts, self.offset_bytes),
            Direction::Write => write_parts_at(self.file.as_fd(), &self.parts, self.offset_bytes),
        }
    }

    /// The ring's entry for it. What it points to stays where it is when `self` is moved.
    fn entry(&self) -> squeue::Entry {
        let fd = Fd(self.file.as_fd().as_raw_fd());
        let vector = self.parts.vector();
        let count = u32::try_from(vector.len()).expect("a few parts");
        let only = if let [only] = vector { Some(only) } else { None };
        let len = only.map_or(0, |only| u32::try_from(only.iov_len).expect("at most 1 GiB"));
        match (self.direction, only) {
            (Direction::Read, Some(only)) => {
                let read = opcode::Read::new(fd, only.iov_base.cast(), len);
                read.offset(self.offset_bytes).build()
            }
            (Direction::Read, None) => {
                let read = opcode::Readv::new(fd, vector.as_ptr(), count);
                read.offset(self.offset_bytes).build()
            }
            (Direction::Write, Some(only)) => {
                let write = opcode::Write::new(fd, only.iov_base.cast_const().cast(), len);
                write.offset(self.offset_bytes).build()
            }
            (Direction::Write, None) => {
                let write = opcode::Writev::new(fd, vector.as_ptr(), count);
                write.offset(self.offset_bytes).build()
            }
        }
    }
}

/// A request that has ended.
#[derive(Debug)]
pub struct Completion<'m, T> {
    /// The request, to be used again.
    pub submission: Submission<'m, T>,
    /// Bytes that were moved (perhaps fewer than were asked for), or the error.
    pub result: Result<usize, Errno>,
}

/// Reads and writes, some of them in flight.
pub trait Queue<'m, T> {
    /// Requests that may still be pushed.
    fn room(&self) -> usize;
    /// Requests that were pushed and have not come back.
    fn in_flight(&self) -> usize;
    /// Adds a request. It may not start before [`start`](Self::start) or [`wait`](Self::wait).
    fn push(&mut self, submission: Submission<'m, T>);
    /// Starts what was pushed.
    fn start(&mut self);
    /// Starts what was pushed, then waits until `least` requests have ended or `timeout` has
    /// passed, and hands out all that have ended. A queue that cannot wait for several waits for
    /// one. When the queue itself fails, what it has not carried out comes back with ECANCELED.
    fn wait(&mut self, least: usize, timeout: Duration, ended: &mut Vec<Completion<'m, T>>);
}

/// A ring with nothing in flight.
pub struct Ring {
    ring: IoUring,
    /// The process that set it up; a child of fork must not use it.
    owner: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Ring").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl Ring {
    /// Sets a ring up.
    ///
    /// # Errors
    /// ENOSYS where the kernel is older than 5.11 or `kernel.io_uring_disabled`
    /// or a seccomp filter says no (also EPERM); ENOMEM beyond
    /// `RLIMIT_MEMLOCK` before 5.12.
    pub fn new() -> Result<Self, Errno> {
        enter(Call::RingSetup)?;
        let entries = DEPTH as u32;
        let built = match IoUring::builder().setup_coop_taskrun().build(entries) {
            // Cooperative task running came with 5.19.
            Err(error) if errno_of(&error) == Errno::INVAL => IoUring::new(entries),
            built => built,
        };
        let ring = built.map_err(|error| errno_of(&error))?;
        let parameters = ring.params();
        let usable = parameters.is_feature_ext_arg()
            && parameters.is_feature_nodrop()
            && parameters.is_feature_submit_stable();
        if !usable {
            return Err(Errno::NOSYS);
        }
        Ok(Self { ring, owner: crate::sys::process::id() })
    }

    /// The ring as a queue of up to `wanted` requests for as long as `body` runs. Also says
    /// whether the ring may be used again.
    pub(crate) fn session<'m, T, R>(
        &mut self,
        wanted: usize,
        body: impl FnOnce(&mut dyn Queue<'m, T>) -> R,
    ) -> (R, bool) {
        let slots = wanted.clamp(1, DEPTH);
        let mut session = Session {
            ring: &mut self.ring,
            owner: self.owner,
            submissions: Vec::with_capacity(slots),
            free: (0..slots).rev().collect(),
            failed: false,
        };
        session.submissions.resize_with(slots, || None);
        let outcome = body(&mut session);
        session.drain(drop);
        let usable = !session.failed && session.unsubmitted() == 0;
        (outcome, usable)
    }
}

/// A ring in use. What is in `submissions` is in the submission queue or in flight.
struct Session<'r, 'm, T> {
    ring: &'r mut IoUring,
    owner: u32,
    submissions: Vec<Option<Submission<'m, T>>>,
    free: Vec<usize>,
    /// The kernel has refused to enter the ring.
    failed: bool,
}

impl<'m, T> Session<'_, 'm, T> {
    /// In a child of fork what is in flight is its parent's, and so is its end: both have
    /// the same ring.
    fn is_of_parent(&self) -> bool {
        self.owner != crate::sys::process::id()
    }

    fn unsubmitted(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Moves what has ended from the ring to `ended`.
    fn reap(&mut self, mut ended: impl FnMut(Completion<'m, T>)) {
        for entry in self.ring.completion() {
            let slot = usize::try_from(entry.user_data()).expect("a slot of this session");
            let submission = self.submissions[slot].take().expect("a request ends once");
            self.free.push(slot);
            let result = usize::try_from(entry.result())
                .map_err(|_| Errno::from_raw_os_error(-entry.result()));
            let result = match submission.direction {
                Direction::Read => result,
                Direction::Write => {
                    result.and_then(|bytes| enter_for(Call::RingWriteAnswer, bytes))
                }
            };
            ended(Completion { submission, result });
        }
    }

    /// `io_uring_enter`: submits, and waits for `want` to end or `timeout`.
    fn enter(&mut self, want: usize, timeout: Duration) -> Result<(), Errno> {
        let timeout = Timespec::from(timeout);
        let arguments = SubmitArgs::new().timespec(&timeout);
        for _ in 0..AGAIN_LIMIT {
            enter(Call::RingEnter)?;
            let entered = if want == 0 {
                self.ring.submitter().submit()
            } else {
                self.ring.submitter().submit_with_args(want, &arguments)
            };
            match entered.map_err(|error| errno_of(&error)) {
                Ok(_) | Err(Errno::TIME | Errno::INTR) => return Ok(()),
                // Out of memory for the moment, or completions to be taken first.
                Err(Errno::AGAIN | Errno::BUSY) => {
                    if !self.ring.completion().is_empty() {
                        return Ok(());
                    }
                    std::thread::yield_now();
                }
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::AGAIN)
    }

    /// Waits until the kernel has no request of this session's. Requests that were
    /// never submitted stay in `submissions`; their ring is not used again.
    fn drain(&mut self, mut ended: impl FnMut(Completion<'m, T>)) {
        self.failed |= self.is_of_parent();
        while !self.failed {
            self.reap(&mut ended);
            let held = self.submissions.len() - self.free.len();
            if held == self.unsubmitted() {
                return;
            }
            // SAFETY: submits nothing and waits for one completion; there is no argument.
            let waited = unsafe {
                let flags = io_uring::EnterFlags::GETEVENTS.bits();
                self.ring.submitter().enter::<libc::sigset_t>(0, 1, flags, None)
            };
            if waited.is_err() {
                // EINTR, or nothing that may end the wait: the memory is the kernel's until then.
                std::thread::yield_now();
            }
        }
    }

    /// Ends the use of a ring that the kernel refuses to enter: every request
    /// comes back, once the kernel has let go of it.
    fn give_up(&mut self, ended: &mut Vec<Completion<'m, T>>) {
        self.drain(|completion| ended.push(completion));
        self.failed = true;
        let left = self.submissions.iter_mut().filter_map(Option::take);
        ended
            .extend(left.map(|submission| Completion { submission, result: Err(Errno::CANCELED) }));
        self.free = (0..self.submissions.len()).rev().collect();
    }
}

impl<T> Drop for Session<'_, '_, T> {
    fn drop(&mut self) {
        // Also when the body panics.
        self.drain(drop);
    }
}

impl<'m, T> Queue<'m, T> for Session<'_, 'm, T> {
    fn room(&self) -> usize {
        self.free.len()
    }

    fn in_flight(&self) -> usize {
        self.submissions.len() - self.free.len()
    }

    fn push(&mut self, submission: Submission<'m, T>) {
        let slot = self.free.pop().expect("room was asked for");
        let entry = submission.entry().user_data(slot as u64);
        self.submissions[slot] = Some(submission);
        if self.failed {
            return;
        }
        // SAFETY: the parts were spans for 'm, which outlives this session, and the session
        // does not end before the request does. The vector and the file are kept in
        // `submissions` meanwhile. The queue has as many entries as there are slots.
        unsafe {
            self.ring.submission().push(&entry).expect("as many entries as slots");
        }
    }

    fn start(&mut self) {
        if !self.failed && self.unsubmitted() > 0 {
            // What this cannot start the next wait will, or say why not.
            let _later = self.enter(0, Duration::ZERO);
        }
    }

    fn wait(&mut self, least: usize, timeout: Duration, ended: &mut Vec<Completion<'m, T>>) {
        if self.failed || self.is_of_parent() {
            self.give_up(ended);
            return;
        }
        let before = ended.len();
        self.reap(|completion| ended.push(completion));
        let want = least.min(self.in_flight() + ended.len() - before);
        let want = want.saturating_sub(ended.len() - before);
        if want == 0 && self.unsubmitted() == 0 {
            return;
        }
        if self.enter(want, timeout).is_err() {
            self.give_up(ended);
            return;
        }
        self.reap(|completion| ended.push(completion));
    }
}

/// Idle rings, so that a call need not set one up.
#[derive(Debug, Default)]
pub struct RingPool {
    idle: ForkLock<Vec<Ring>>,
}

impl RingPool {
    /// No ring yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { idle: ForkLock::new(Vec::new()) }
    }

    /// An idle ring of this process, or a new one.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn take(&self) -> Result<Ring, Errno> {
        let owner = crate::sys::process::id();
        // Held for a moment, which costs a hundredth of setting a ring up. What a parent left
        // is dropped once the lock is free: that makes system calls.
        let (ring, _of_parent) = {
            let mut idle = self.idle.lock();
            let of_parent: Vec<Ring> = idle.extract_if(.., |ring| ring.owner != owner).collect();
            (idle.pop(), of_parent)
        };
        ring.map_or_else(Ring::new, Ok)
    }

    /// Keeps a ring for the next call.
    pub(crate) fn give_back(&self, ring: Ring) {
        let mut idle = self.idle.lock();
        if idle.len() < MAX_IDLE {
            idle.push(ring);
            return;
        }
        drop(idle);
        drop(ring);
    }

    /// Runs `body` with a queue that has requests in flight together: a ring or, where the
    /// kernel gives none, up to `wanted` threads. Where there is no thread to be had either,
    /// one request follows the other.
    pub fn together<'m, T: Send, R>(
        &self,
        wanted: usize,
        body: impl FnOnce(&mut dyn Queue<'m, T>) -> R,
    ) -> R {
        if let Ok(mut ring) = self.take() {
            let (outcome, usable) = ring.session(wanted, body);
            if usable {
                self.give_back(ring);
            }
            return outcome;
        }
        match with_threads(wanted, body) {
            Ok(outcome) => outcome,
            Err(body) => body(&mut Caller::one_by_one()),
        }
    }
}
