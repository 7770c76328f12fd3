//! Keeps what windows have mapped of their files within limits.
//!
//! The kernel maps pages of a file as they are touched, and does not tell. So one thread of the
//! process, the *trimmer*, looks. It first asks how much the process has mapped of all files,
//! which takes a microsecond or two. Only when that has grown by what a limit still allows does
//! it ask in which blocks the pages are, and unmaps the oldest blocks ([`policy`]). Nothing is
//! lost: the pages stay in the page cache, and modified ones stay dirty there.
//!
//! The thread runs while a window is registered that is larger than its limit. While the process
//! is idle, it sleeps ([`BusyTimer`]). A child of fork inherits neither the thread nor its locks,
//! and starts its own when it makes windows.

mod advice;
mod policy;
mod trim_loop;

use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc, Arc, Mutex, Weak};
use std::thread::JoinHandle;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::memory::{self, Ask, Reservation};
use crate::sys::cputime::{MappedBytes, Waiter};
use crate::sys::fork_lock::{ForkGuard, ForkLock};
use crate::sys::lock::lock;
use crate::sys::pagemap::PageMap;
use crate::sys::process;
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::spawn_without_signals;

use policy::Marks;
use trim_loop::TrimLoop;

/// What a window lets the trimmer do.
pub trait Trimmed: Send + Sync + 'static {
    /// Where its pages are mapped.
    fn memory(&self) -> Span<'_>;

    /// Has these ranges of bytes unmapped, and their page tables go; touches bring the pages
    /// back. What the window has of its own stays.
    /// Fails (EINVAL) for pages that are locked.
    fn give_back(&self, pagemap: &PageMap, ranges: &[Range<usize>]) -> Result<(), Errno>;

    /// Whether the kernel may keep some of what is given back.
    fn keeps_some(&self) -> bool;

    /// Has the kernel read ahead so.
    fn advise(&self, advice: ReadAhead) -> Result<(), Errno>;
}

/// How the kernel reads when a page is touched that is not in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ReadAhead {
    /// What lies around the page; further ahead where touches run forwards.
    Normal,
    /// Nothing but the page.
    Random,
    /// Far ahead.
    Sequential,
}

/// How many bytes windows may have mapped, together.
#[derive(Debug)]
pub struct Limit {
    bytes: AtomicU64,
    /// Where it is a share of what the process may have.
    shared: Option<Reservation>,
    /// The size of all windows that are registered with it.
    window_bytes: AtomicU64,
}

impl Limit {
    /// A limit for one window.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { bytes: bytes.into(), shared: None, window_bytes: AtomicU64::new(0) })
    }

    /// The limit that all windows share which are given none: one share of what "auto" budgets
    /// come to together.
    pub fn automatic() -> Result<Arc<Self>> {
        if let Some(limit) = state().automatic.upgrade() {
            return Ok(limit);
        }
        // Not under the lock: others may have to give memory back for it.
        let reserved = memory::reserve(Ask::Auto { need: u64::MAX });
        let shared = reserved.map_err(|errno| Error::system("Window", errno))?;
        let limit = Arc::new(Self {
            bytes: AtomicU64::new(0),
            shared: Some(shared),
            window_bytes: AtomicU64::new(0),
        });
        let mut state = state();
        if let Some(other) = state.automatic.upgrade() {
            drop(state);
            return Ok(other);
        }
        state.automatic = Arc::downgrade(&limit);
        Ok(limit)
    }

    /// The limit.
    pub fn bytes(&self) -> u64 {
        match &self.shared {
            Some(reservation) => reservation.bytes(),
            None => self.bytes.load(Ordering::Relaxed),
        }
    }

    /// Leaves so many of its bytes to others.
    pub fn lower(&self, bytes: u64) {
        let less = |limit: u64| Some(limit.saturating_sub(bytes));
        let _always = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    fn is_tight(&self) -> bool {
        let window_bytes = self.window_bytes.load(Ordering::Relaxed);
        // With a page table for each block.
        window_bytes + window_bytes / 256 > Marks::of(self.bytes()).high
    }
}

/// A window that is registered.
struct Watched {
    id: u64,
    /// None for a window that may have all of it mapped.
    limit: Option<Arc<Limit>>,
    /// Its read-ahead follows how it is touched.
    adapts: bool,
    /// Blocks of 2 MiB that it has given back.
    blocks_trimmed: AtomicU64,
    /// None once the window is about to go. Held while the trimmer works on it.
    target: Mutex<Option<Arc<dyn Trimmed>>>,
}

impl Watched {
    /// The limit's windows become larger, or smaller by a number that wraps around.
    fn add_bytes(&self, bytes: u64) {
        if let Some(limit) = &self.limit {
            limit.window_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn needs_thread(&self) -> bool {
        self.adapts || self.limit.as_ref().is_some_and(|limit| limit.is_tight())
    }
}

#[derive(Debug)]
struct Running {
    waiter: Waiter,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Running {
    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        // The thread is there until it is joined, so that the signal reaches it.
        if let Err(errno) = self.waiter.wake() {
            stderr_line(format_args!("the thread that trims windows cannot be woken: {errno}"));
            return;
        }
        if self.thread.join().is_err() {
            stderr_line(format_args!("the thread that trims windows had panicked"));
        }
    }
}

/// The windows of a process and their thread.
struct State {
    process: u32,
    windows: Vec<Arc<Watched>>,
    running: Option<Running>,
    automatic: Weak<Limit>,
    last_id: u64,
}

impl State {
    const fn new() -> Self {
        Self { process: 0, windows: Vec::new(), running: None, automatic: Weak::new(), last_id: 0 }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

static STATE: ForkLock<State> = ForkLock::new(State::new());
/// Counts changes of the windows.
static VERSION: AtomicU64 = AtomicU64::new(0);

/// The state of this process. A child of fork begins anew: its parent's windows and their thread
/// are not its own.
fn state() -> ForkGuard<'static, State> {
    let mut state = STATE.lock();
    let process = process::id();
    if state.process != process {
        let parents = std::mem::replace(&mut *state, State { process, ..State::new() });
        // There is no thread to join, and its locks may be taken.
        std::mem::forget(parents);
    }
    state
}

fn start() -> Result<Running> {
    let fail = |errno| {
        Error::system_with_hint(
            "Window",
            errno,
            "; a budget is kept by a thread that reads /proc/self: pass budget=None to do \
             without",
        )
    };
    let no_thread = |errno| {
        let instead = "pass budget=None: a budget is kept by a thread";
        Error::NoThread { operation: "Window", instead, errno }
    };
    let mapped = MappedBytes::open().map_err(fail)?;
    let pagemap = PageMap::open().map_err(fail)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (send, receive) = mpsc::channel();
    let stopped = Arc::clone(&stop);
    let body = move || {
        // Nobody hears it only if who starts the thread has panicked.
        let _heard = send.send(Waiter::this_thread());
        let mut trim_loop = TrimLoop::new(mapped, pagemap);
        let look = AssertUnwindSafe(|| trim_loop.run(&stopped));
        if catch_unwind(look).is_err() {
            stderr_line(format_args!(
                "the thread that keeps windows to their budgets panicked, which is a bug; \
                 they grow as plain mappings do from now on"
            ));
            trim_loop.wait_for_end(&stopped);
        }
    };
    let thread = spawn_without_signals("fremap-trim", body).map_err(no_thread)?;
    let waiter = receive.recv().map_err(|_gone| no_thread(Errno::AGAIN))?;
    Ok(Running { waiter, stop, thread })
}

/// A window's place with the trimmer; dropped, the trimmer leaves the window alone.
pub struct Registration {
    watched: Arc<Watched>,
    process: u32,
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Registration").field("limit", &self.watched.limit).finish_non_exhaustive()
    }
}

impl Registration {
    /// Has a window kept to a limit from now on, and its read-ahead follow how it is touched.
    pub fn new(target: Arc<dyn Trimmed>, limit: Option<Arc<Limit>>, adapts: bool) -> Result<Self> {
        let bytes = target.memory().len() as u64;
        let mut state = state();
        state.last_id += 1;
        let watched = Arc::new(Watched {
            id: state.last_id,
            limit,
            adapts,
            blocks_trimmed: AtomicU64::new(0),
            target: Mutex::new(Some(target)),
        });
        watched.add_bytes(bytes);
        if watched.needs_thread() && state.running.is_none() {
            match start() {
                Ok(running) => state.running = Some(running),
                Err(error) => {
                    watched.add_bytes(bytes.wrapping_neg());
                    return Err(error);
                }
            }
        }
        state.windows.push(Arc::clone(&watched));
        VERSION.fetch_add(1, Ordering::SeqCst);
        if let Some(running) = &state.running {
            // It may sleep until the process is busy for longer than it may be now.
            let woken = running.waiter.wake();
            woken.map_err(|errno| Error::system("Window", errno))?;
        }
        let process = state.process;
        drop(state);
        Ok(Self { watched, process })
    }

    /// What the window may have mapped, with all that share its limit.
    pub fn limit(&self) -> Option<&Limit> {
        self.watched.limit.as_deref()
    }

    /// Leaves a part of the limit to others; a thread is there if that makes it tight.
    pub fn lower_limit(&self, bytes: u64) -> Result<()> {
        let Some(limit) = &self.watched.limit else { return Ok(()) };
        limit.lower(bytes);
        let mut state = state();
        if self.watched.needs_thread() && state.running.is_none() {
            state.running = Some(start()?);
        }
        Ok(())
    }

    /// Blocks of 2 MiB that the window has given back.
    pub fn blocks_trimmed(&self) -> u64 {
        self.watched.blocks_trimmed.load(Ordering::Relaxed)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.process != process::id() {
            // A child of fork: its parent's lock may be taken forever here.
            return;
        }
        // Waits for what the trimmer is doing with the window.
        let target = lock(&self.watched.target).take();
        let bytes = target.as_ref().map_or(0, |target| target.memory().len() as u64);
        drop(target);
        let ended = {
            let mut state = state();
            state.windows.retain(|watched| watched.id != self.watched.id);
            self.watched.add_bytes(bytes.wrapping_neg());
            VERSION.fetch_add(1, Ordering::SeqCst);
            let needed = state.windows.iter().any(|watched| watched.needs_thread());
            if needed {
                None
            } else {
                state.running.take()
            }
        };
        if let Some(running) = ended {
            running.end();
        }
    }
}
