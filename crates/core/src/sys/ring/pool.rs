//! The queue for kernels without a ring: within a closure, threads that each make one `preadv` or
//! `pwritev` after another.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::thread::Crew;
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
    let serve = || shared.serve();
    // SAFETY: the session, which has the crew, is dropped when this function ends.
    let crew = unsafe { Crew::start("fremap-io", wanted.clamp(1, MAX_THREADS), &serve) };
    let Some(crew) = crew.ok().filter(|crew| crew.len() > 0) else { return Err(body) };
    let limit = crew.len() * REQUESTS_PER_THREAD;
    let mut session = Session { shared: &shared, held: 0, limit, crew };
    Ok(body(&mut session))
}

/// The caller's end of the queue.
struct Session<'s, 'm, T> {
    shared: &'s Shared<'m, T>,
    held: usize,
    limit: usize,
    /// Waited for once the session has said that all is over.
    crew: Crew<'s>,
}

impl<T> Drop for Session<'_, '_, T> {
    fn drop(&mut self) {
        // In a child of fork one of the threads, which it has not, may have held the lock.
        if self.crew.is_own() {
            self.shared.state().over = true;
            self.shared.work.notify_all();
        }
    }
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
        if !self.crew.is_own() {
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
