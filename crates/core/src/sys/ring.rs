//! Reads in flight together: a queue of them, and the queue that is a ring
//! (`io_uring`, Linux 5.11 and later).
//!
//! The kernel writes into the memory of a read until it completes, so a ring
//! hands itself out for the length of a closure only ([`Ring::session`]) and
//! waits for whatever is in flight before that returns, by whichever way.

mod pool;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{opcode, IoUring};
use rustix::io::Errno;

use super::call::{enter, Call};
use super::file::Parts;

pub use pool::{with_threads, MAX_THREADS};

/// Reads that a ring has in flight at most. Beyond it devices gain nothing.
pub const DEPTH: usize = 128;
/// Idle rings that a pool keeps.
const MAX_IDLE: usize = 4;
/// With this many in flight a wait is for several, so that each costs less.
const BUSY: usize = 32;
/// How many such a wait is for.
const BUSY_WAIT: usize = 8;
/// How often the kernel's EAGAIN and EBUSY are answered by trying again.
const AGAIN_LIMIT: u32 = 64;

/// The file of a read, which stays open until the read has ended.
#[derive(Clone, Debug)]
pub enum ReadFile<'f> {
    /// One that others keep open.
    Borrowed(BorrowedFd<'f>),
    /// One that is closed when its last read has ended.
    Shared(Arc<OwnedFd>),
}

impl AsFd for ReadFile<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Borrowed(fd) => *fd,
            Self::Shared(fd) => fd.as_fd(),
        }
    }
}

/// A read: bytes of a file from `offset_bytes` into `parts`.
#[derive(Debug)]
pub struct Read<'f, 'm> {
    /// The caller's name for it.
    pub id: u32,
    /// The file.
    pub file: ReadFile<'f>,
    /// Where in the file.
    pub offset_bytes: u64,
    /// Where in memory.
    pub parts: Parts<'m>,
}

/// A read that has ended.
#[derive(Debug)]
pub struct Completion<'f, 'm> {
    /// The read, to be used again.
    pub read: Read<'f, 'm>,
    /// Bytes that came (perhaps fewer than were asked for), or the error.
    pub result: Result<usize, Errno>,
}

/// Reads, some of them in flight.
pub trait ReadQueue<'f, 'm> {
    /// Reads that may still be pushed.
    fn room(&self) -> usize;
    /// Reads that were pushed and have not come back.
    fn in_flight(&self) -> usize;
    /// Adds a read. It may not start before [`start`](Self::start) or [`wait`](Self::wait).
    fn push(&mut self, read: Read<'f, 'm>);
    /// Starts what was pushed.
    fn start(&mut self);
    /// Starts what was pushed, then waits until a read has ended or `timeout`
    /// has passed, and hands out all that have ended. When the queue itself
    /// fails, every read comes back with its error.
    fn wait(&mut self, timeout: Duration, ended: &mut Vec<Completion<'f, 'm>>);
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

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
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
        Ok(Self { ring, owner: std::process::id() })
    }

    /// Reads through this ring for as long as `body` runs. Also says whether the ring
    /// may be used again.
    pub fn session<'f, 'm, T>(
        &mut self,
        body: impl FnOnce(&mut dyn ReadQueue<'f, 'm>) -> T,
    ) -> (T, bool) {
        let mut session = Session {
            ring: &mut self.ring,
            owner: self.owner,
            reads: Vec::with_capacity(DEPTH),
            free: (0..DEPTH).rev().collect(),
            failed: None,
        };
        session.reads.resize_with(DEPTH, || None);
        let outcome = body(&mut session);
        session.drain(drop);
        let usable = session.failed.is_none() && session.unsubmitted() == 0;
        (outcome, usable)
    }
}

/// A ring in use. What is in `reads` is in the submission queue or in flight.
struct Session<'r, 'f, 'm> {
    ring: &'r mut IoUring,
    owner: u32,
    reads: Vec<Option<Read<'f, 'm>>>,
    free: Vec<usize>,
    failed: Option<Errno>,
}

impl<'f, 'm> Session<'_, 'f, 'm> {
    fn unsubmitted(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Moves what has ended from the ring to `ended`.
    fn reap(&mut self, mut ended: impl FnMut(Completion<'f, 'm>)) {
        for entry in self.ring.completion() {
            let slot = usize::try_from(entry.user_data()).expect("a slot of this session");
            let read = self.reads[slot].take().expect("a read ends once");
            self.free.push(slot);
            let result = usize::try_from(entry.result())
                .map_err(|_| Errno::from_raw_os_error(-entry.result()));
            ended(Completion { read, result });
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

    /// Waits until the kernel has no read of this session's. Reads that were
    /// never submitted stay in `reads`; their ring is not used again.
    fn drain(&mut self, mut ended: impl FnMut(Completion<'f, 'm>)) {
        if self.owner != std::process::id() {
            // A child of fork: what is in flight is its parent's, and so is its end.
            self.failed = Some(Errno::CANCELED);
        }
        while self.failed.is_none() {
            self.reap(&mut ended);
            let held = DEPTH - self.free.len();
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

    /// Ends the use of a ring that the kernel refuses to enter: every read
    /// comes back with the error, once the kernel has let go of it.
    fn give_up(&mut self, errno: Errno, ended: &mut Vec<Completion<'f, 'm>>) {
        self.drain(|completion| ended.push(completion));
        self.failed = Some(errno);
        for slot in 0..DEPTH {
            if let Some(read) = self.reads[slot].take() {
                ended.push(Completion { read, result: Err(errno) });
            }
        }
        self.free = (0..DEPTH).rev().collect();
    }
}

impl Drop for Session<'_, '_, '_> {
    fn drop(&mut self) {
        // Also when the body panics.
        self.drain(drop);
    }
}

impl<'f, 'm> ReadQueue<'f, 'm> for Session<'_, 'f, 'm> {
    fn room(&self) -> usize {
        self.free.len()
    }

    fn in_flight(&self) -> usize {
        DEPTH - self.free.len()
    }

    fn push(&mut self, read: Read<'f, 'm>) {
        let fd = Fd(read.file.as_fd().as_raw_fd());
        let slot = self.free.pop().expect("room was asked for");
        let vector = read.parts.vector();
        let entry = if let [only] = vector {
            let len = u32::try_from(only.iov_len).expect("a page is at most 1 GiB");
            opcode::Read::new(fd, only.iov_base.cast(), len).offset(read.offset_bytes).build()
        } else {
            let count = u32::try_from(vector.len()).expect("a few parts");
            opcode::Readv::new(fd, vector.as_ptr(), count).offset(read.offset_bytes).build()
        };
        self.reads[slot] = Some(read);
        if self.failed.is_some() {
            return;
        }
        // SAFETY: the parts were spans for 'm, which outlives this session, and the session
        // does not end before the read does. The vector and the file are kept in `reads`
        // meanwhile. The queue has as many entries as there are slots.
        unsafe {
            let entry = entry.user_data(slot as u64);
            self.ring.submission().push(&entry).expect("as many entries as slots");
        }
    }

    fn start(&mut self) {
        if self.failed.is_none() && self.unsubmitted() > 0 {
            // What this cannot start the next wait will, or say why not.
            let _later = self.enter(0, Duration::ZERO);
        }
    }

    fn wait(&mut self, timeout: Duration, ended: &mut Vec<Completion<'f, 'm>>) {
        if let Some(errno) = self.failed {
            self.give_up(errno, ended);
            return;
        }
        let before = ended.len();
        self.reap(|completion| ended.push(completion));
        let ready = ended.len() > before;
        if ready && self.unsubmitted() == 0 {
            return;
        }
        let want = match self.in_flight() {
            _ if ready => 0,
            in_flight if in_flight > BUSY => BUSY_WAIT,
            _ => 1,
        };
        if let Err(errno) = self.enter(want, timeout) {
            self.give_up(errno, ended);
            return;
        }
        self.reap(|completion| ended.push(completion));
    }
}

/// Idle rings, so that a read need not set one up.
#[derive(Debug, Default)]
pub struct RingPool {
    idle: Mutex<Vec<Ring>>,
}

impl RingPool {
    /// An idle ring of this process, or a new one.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn take(&self) -> Result<Ring, Errno> {
        // Never waits: in a child of fork the lock's holder may not exist.
        if let Ok(mut idle) = self.idle.try_lock() {
            let owner = std::process::id();
            idle.retain(|ring| ring.owner == owner);
            if let Some(ring) = idle.pop() {
                return Ok(ring);
            }
        }
        Ring::new()
    }

    /// Keeps a ring for the next read.
    pub fn give_back(&self, ring: Ring) {
        if let Ok(mut idle) = self.idle.try_lock() {
            if idle.len() < MAX_IDLE {
                idle.push(ring);
            }
        }
    }
}
