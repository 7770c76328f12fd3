//! Submitted takes, which run without their caller: a few threads of the process run them, each one
//! at a time.
//!
//! A pending take owns the memory that it fills until the last read into it has ended, even if no
//! caller waits for it any more. The threads start when they are needed and exit after a while
//! without work. They block every signal except SIGBUS of their own faults.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{Rows, RowsOrRuns};
use crate::error::{Error, Interrupt, Result, LONGEST_WAIT};
use crate::sys::fork_lock::ForkLock;
use crate::sys::futex;
use crate::sys::span::Span;
use crate::sys::thread::{let_faults_through, spawn_without_signals, Event};

/// Takes that are under way at once at most, whatever the processors: they wait for devices.
const MAX_THREADS: u32 = 4;
/// How long a thread waits for another take before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// Memory that a take fills, kept until that has ended.
pub trait Memory: Send + Sync {
    /// Its bytes.
    fn span(&self) -> Span<'_>;
}

const UNDER_WAY: u32 = 0;
const DONE: u32 = 1;

/// A take that was submitted.
pub struct Pending {
    rows: Arc<Rows>,
    asked: RowsOrRuns,
    memory: Box<dyn Memory>,
    /// The process that does it.
    owner: u32,
    state: AtomicU32,
    cancelled: AtomicBool,
    outcome: OnceLock<Result<()>>,
    /// Becomes readable once it is done.
    event: ForkLock<Option<Arc<Event>>>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Pending").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Interrupt for Pending {
    fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::Interrupted { completed: 0 });
        }
        Ok(())
    }
}

impl Pending {
    /// What has come of it; none while it is under way.
    #[must_use]
    pub fn outcome(&self) -> Option<&Result<()>> {
        self.outcome.get()
    }

    /// Ends it early, if it is not done: what it has in flight ends first.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was ended early.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self.outcome(), Some(Err(Error::Interrupted { .. })))
    }

    /// # Errors
    /// [`Error::Fork`] in a child of the process that does it.
    pub fn check_owner(&self) -> Result<()> {
        if self.owner == crate::sys::process::id() || self.outcome().is_some() {
            return Ok(());
        }
        Err(Error::Fork { operation: "take", what: "pending take", owner: self.owner })
    }

    /// Waits until it is done, or `timeout` has passed; says whether it is.
    ///
    /// # Errors
    /// [`Error::Fork`], [`Error::Interrupted`].
    pub fn wait(&self, timeout: Option<Duration>, interrupt: &dyn Interrupt) -> Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if self.outcome().is_some() {
                return Ok(true);
            }
            self.check_owner()?;
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            futex::wait(&self.state, UNDER_WAY, left.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT));
            interrupt.check()?;
        }
    }

    /// Another descriptor that can be read once it is done.
    ///
    /// # Errors
    /// [`Error::Fork`]; EMFILE at the limit of descriptors.
    pub fn event(&self) -> Result<OwnedFd> {
        self.check_owner()?;
        let fail = |errno| Error::system("take", errno);
        let mut slot = self.event.lock();
        let event = match slot.as_ref() {
            Some(event) => Arc::clone(event),
            None => Arc::new(Event::new().map_err(fail)?),
        };
        *slot = Some(Arc::clone(&event));
        drop(slot);
        // Whoever ends the take looks for the event after it has set the outcome.
        if self.outcome().is_some() {
            event.set();
        }
        event.descriptor().map_err(fail)
    }

    /// What a thread does.
    fn run(&self) {
        let take = || {
            self.check().and_then(|()| self.rows.take_all(&self.asked, self.memory.span(), self))
        };
        // A bug there must not leave anybody waiting.
        let outcome = catch_unwind(AssertUnwindSafe(take))
            .unwrap_or_else(|_| Err(Error::system("take", Errno::NOTRECOVERABLE)));
        let _first = self.outcome.set(outcome);
        self.state.store(DONE, Ordering::Release);
        futex::wake_all(&self.state);
        let event = self.event.lock().clone();
        if let Some(event) = event {
            event.set();
        }
    }
}

impl Rows {
    /// Begins to copy rows into `memory`, one after another, and returns at once.
    ///
    /// # Errors
    /// As [`take`](Self::take) for what can be said at once; [`Error::NoThread`].
    pub fn submit(
        self: &Arc<Self>,
        asked: RowsOrRuns,
        memory: Box<dyn Memory>,
    ) -> Result<Arc<Pending>> {
        self.check_take(&asked, memory.span())?;
        let pending = Arc::new(Pending {
            rows: Arc::clone(self),
            asked,
            memory,
            owner: crate::sys::process::id(),
            state: AtomicU32::new(UNDER_WAY),
            cancelled: AtomicBool::new(false),
            outcome: OnceLock::new(),
            event: ForkLock::default(),
        });
        SERVICE.enqueue(Arc::clone(&pending))?;
        Ok(pending)
    }
}

/// What waits to be done, and who does it.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Arc<Pending>>,
    threads: u32,
    /// Threads that wait for a take.
    idle: u32,
    /// The process that the threads are in: a child of fork has none of them.
    owner: u32,
}

struct Service {
    queue: ForkLock<Queue>,
    /// Changes with every take that is submitted.
    submitted: AtomicU32,
}

static SERVICE: Service = Service {
    queue: ForkLock::new(Queue { waiting: VecDeque::new(), threads: 0, idle: 0, owner: 0 }),
    submitted: AtomicU32::new(0),
};

impl Service {
    fn enqueue(&'static self, pending: Arc<Pending>) -> Result<()> {
        let mut queue = self.queue.lock();
        if queue.owner != pending.owner {
            // What waited is the parent's, and so is the memory: neither is dropped.
            let of_parent = std::mem::take(&mut queue.waiting);
            std::mem::forget(of_parent);
            *queue = Queue { owner: pending.owner, ..Queue::default() };
        }
        queue.waiting.push_back(pending);
        if queue.idle < queue.waiting.len() as u32 && queue.threads < MAX_THREADS {
            match spawn_without_signals("fremap-take", || self.serve()) {
                Ok(_detached) => queue.threads += 1,
                // Those that there are will do it.
                Err(_) if queue.threads > 0 => {}
                Err(errno) => {
                    queue.waiting.pop_back();
                    return Err(Error::NoThread {
                        operation: "submit",
                        instead: "use take",
                        errno,
                    });
                }
            }
        }
        drop(queue);
        self.submitted.fetch_add(1, Ordering::Release);
        futex::wake_one(&self.submitted);
        Ok(())
    }

    fn serve(&self) {
        // Where it fails rows are read, not copied from maps, and nothing else changes.
        let _let = let_faults_through();
        loop {
            let seen = self.submitted.load(Ordering::Acquire);
            let next = {
                let mut queue = self.queue.lock();
                let next = queue.waiting.pop_front();
                queue.idle += u32::from(next.is_none());
                next
            };
            if let Some(pending) = next {
                pending.run();
                continue;
            }
            let woken = futex::wait(&self.submitted, seen, IDLE);
            let mut queue = self.queue.lock();
            queue.idle -= 1;
            if !woken && queue.waiting.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }
}
