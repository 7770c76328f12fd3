//! The queue for kernels without a ring: within a closure, threads that each make one `preadv` or
//! `pwritev` after another.

use std::collections::VecDeque;
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::io::Errno;

use super::super::thread::{block_all_signals, check_room_to_start, set_signal_mask};
use super::{Completion, Queue, Submission};

/// Threads that are started at most.
const MAX_THREADS: usize = 16;
/// Requests that may wait for each thread, so that none idles while the caller works.
const REQUESTS_PER_THREAD: usize = 2;

struct State<'m, T> {
    waiting: VecDeque<Submission<'m, T>>,
    ended: Vec<Completion<'m, T>>,
    over: bool,
}

/// What the caller and the threads share.
struct Shared<'m, T> {
    state: Mutex<State<'m, T>>,
    /// A request waits, or all is over.
    work: Condvar,
    /// A request has ended.
    news: Condvar,
}

impl<'m, T> Shared<'m, T> {
    fn state(&self) -> MutexGuard<'_, State<'m, T>> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does: one request after another, until all is over.
    fn serve(&self) {
        let mut state = self.state();
        while !state.over {
            let Some(submission) = state.waiting.pop_front() else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let result = submission.carry_out();
            state = self.state();
            state.ended.push(Completion { submission, result });
            self.news.notify_one();
        }
    }
}

/// Threads that serve. Dropped, they have ended, also when the body panics.
struct Crew<'s, 'm, T> {
    shared: &'s Shared<'m, T>,
    threads: Vec<JoinHandle<()>>,
    owner: u32,
}

impl<'s, 'm, T: Send> Crew<'s, 'm, T> {
    /// Starts as many threads as it can, up to `wanted`, with all signals blocked.
    fn start(shared: &'s Shared<'m, T>, wanted: usize) -> Result<Self, Errno> {
        let owner = crate::sys::process::id();
        let mut crew = Self { shared, threads: Vec::with_capacity(wanted), owner };
        let caller = block_all_signals()?;
        while crew.threads.len() < wanted {
            let Ok(limited) = check_room_to_start() else { break };
            let (runs, started) = channel();
            let builder = Builder::new().name("fremap-io".into());
            let body = move || {
                let _told = runs.send(());
                shared.serve();
            };
            // SAFETY: what the thread borrows is there until the crew has been dropped, which
            // waits for it: a crew stays in `with_threads`, behind what it borrows. In a child
            // of fork, where nobody waits, there is no such thread.
            let Ok(thread) = (unsafe { builder.spawn_unchecked(body) }) else { break };
            crew.threads.push(thread);
            if limited {
                let _told = started.recv();
            }
        }
        set_signal_mask(&caller)?;
        Ok(crew)
    }
}

impl<T> Drop for Crew<'_, '_, T> {
    fn drop(&mut self) {
        if self.owner != crate::sys::process::id() {
            // A child of fork has none of them, and one may have held the lock.
            self.threads.drain(..).for_each(std::mem::forget);
            return;
        }
        self.shared.state().over = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // Nothing panics there.
            let _ended = thread.join();
        }
    }
}

/// Runs `body` with threads as its queue: up to `wanted` of them, at most
/// [`MAX_THREADS`], with all signals blocked.
///
/// # Errors
/// `body`, unused, when not one thread can be started.
pub(super) fn with_threads<'m, T: Send, R, B>(wanted: usize, body: B) -> Result<R, B>
where
    B: FnOnce(&mut dyn Queue<'m, T>) -> R,
{
    let state = State { waiting: VecDeque::new(), ended: Vec::new(), over: false };
    let shared = Shared { state: Mutex::new(state), work: Condvar::new(), news: Condvar::new() };
    let Ok(crew) = Crew::start(&shared, wanted.clamp(1, MAX_THREADS)) else { return Err(body) };
    if crew.threads.is_empty() {
        return Err(body);
    }
    let limit = crew.threads.len() * REQUESTS_PER_THREAD;
    let mut session = Session { shared: &shared, held: 0, limit, owner: crew.owner };
    Ok(body(&mut session))
}

/// The caller's end of the queue.
struct Session<'s, 'm, T> {
    shared: &'s Shared<'m, T>,
    held: usize,
    limit: usize,
    owner: u32,
}

impl<'m, T> Queue<'m, T> for Session<'_, 'm, T> {
    fn room(&self) -> usize {
        self.limit - self.held
    }

    fn in_flight(&self) -> usize {
        self.held
    }

    fn push(&mut self, submission: Submission<'m, T>) {
        self.held += 1;
        self.shared.state().waiting.push_back(submission);
        self.shared.work.notify_one();
    }

    fn start(&mut self) {}

    fn wait(&mut self, _least: usize, timeout: Duration, ended: &mut Vec<Completion<'m, T>>) {
        if self.owner != crate::sys::process::id() {
            // In a child of fork nobody serves: what was in flight is its parent's.
            self.held = 0;
            return;
        }
        let state = self.shared.state();
        let (mut state, _) = self
            .shared
            .news
            .wait_timeout_while(state, timeout, |state| state.ended.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        self.held -= state.ended.len();
        ended.append(&mut state.ended);
    }
}
