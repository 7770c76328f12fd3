//! The queue for where the kernel gives no ring: threads that each do one
//! `preadv` or `pwritev` after another, for the length of a closure.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};
use std::time::Duration;

use rustix::io::Errno;

use super::super::thread::{block_all_signals, set_signal_mask};
use super::{Completion, Queue, Submission};

/// Threads that are started at most.
const MAX_THREADS: usize = 16;
/// Requests that may wait for each thread, so that none idles while the caller works.
const REQUESTS_PER_THREAD: usize = 2;

#[derive(Default)]
struct State<'f, 'm> {
    waiting: VecDeque<Submission<'f, 'm>>,
    ended: Vec<Completion<'f, 'm>>,
    over: bool,
}

/// What the caller and the threads share.
#[derive(Default)]
struct Shared<'f, 'm> {
    state: Mutex<State<'f, 'm>>,
    /// A request waits, or all is over.
    work: Condvar,
    /// A request has ended.
    news: Condvar,
}

impl<'f, 'm> Shared<'f, 'm> {
    fn state(&self) -> MutexGuard<'_, State<'f, 'm>> {
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

/// Ends the threads, also when the body panics.
struct Over<'s, 'f, 'm>(&'s Shared<'f, 'm>);

impl Drop for Over<'_, '_, '_> {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.work.notify_all();
    }
}

/// Runs `body` with threads as its queue: up to `wanted` of them, at most
/// [`MAX_THREADS`], with all signals blocked.
///
/// # Errors
/// `body`, unused, when not one thread can be started.
pub(super) fn with_threads<'f, 'm, T, B>(wanted: usize, body: B) -> Result<T, B>
where
    B: FnOnce(&mut dyn Queue<'f, 'm>) -> T,
{
    let shared = Shared::default();
    std::thread::scope(|scope| {
        let over = Over(&shared);
        let started = start_threads(scope, &shared, wanted.clamp(1, MAX_THREADS));
        let threads = started.unwrap_or(0);
        if threads == 0 {
            return Err(body);
        }
        let limit = threads * REQUESTS_PER_THREAD;
        let mut session = Session { shared: &shared, held: 0, limit };
        let outcome = body(&mut session);
        drop(over);
        Ok(outcome)
    })
}

/// Starts as many threads as it can and says how many those are.
fn start_threads<'scope, 'f: 'scope, 'm: 'scope>(
    scope: &'scope Scope<'scope, '_>,
    shared: &'scope Shared<'f, 'm>,
    wanted: usize,
) -> Result<usize, Errno> {
    let caller = block_all_signals()?;
    let started = (0..wanted)
        .take_while(|_| {
            let builder = Builder::new().name("fremap-io".into());
            builder.spawn_scoped(scope, move || shared.serve()).is_ok()
        })
        .count();
    set_signal_mask(&caller)?;
    Ok(started)
}

/// The caller's end of the queue.
struct Session<'s, 'f, 'm> {
    shared: &'s Shared<'f, 'm>,
    held: usize,
    limit: usize,
}

impl<'f, 'm> Queue<'f, 'm> for Session<'_, 'f, 'm> {
    fn room(&self) -> usize {
        self.limit - self.held
    }

    fn in_flight(&self) -> usize {
        self.held
    }

    fn push(&mut self, submission: Submission<'f, 'm>) {
        self.held += 1;
        self.shared.state().waiting.push_back(submission);
        self.shared.work.notify_one();
    }

    fn start(&mut self) {}

    fn wait(&mut self, timeout: Duration, ended: &mut Vec<Completion<'f, 'm>>) {
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
