//! The queue for requests that the caller carries out one after another: requests that do not wait
//! for a device, or a few that the kernel was asked to read ahead.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::Duration;

use super::super::file::advise_willneed;
use super::{Completion, Queue, Submission};

/// Requests that a wait carries out before the caller's interrupt is asked.
const MOST_AT_ONCE: usize = 8;

/// A queue of one request, or of a few advised reads.
#[derive(Debug)]
pub struct Caller<'m, T> {
    waiting: VecDeque<Submission<'m, T>>,
    depth: usize,
    advises: bool,
}

impl<T> Caller<'_, T> {
    /// For one request at a time.
    pub(crate) fn one_by_one() -> Self {
        Self { waiting: VecDeque::new(), depth: 1, advises: false }
    }

    /// For up to `depth` reads through the page cache, each of which the kernel is asked to read
    /// ahead when it is pushed.
    pub(crate) fn advising(depth: usize) -> Self {
        Self { waiting: VecDeque::with_capacity(depth), depth, advises: true }
    }
}

impl<'m, T> Queue<'m, T> for Caller<'m, T> {
    fn room(&self) -> usize {
        self.depth - self.waiting.len()
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn push(&mut self, submission: Submission<'m, T>) {
        if self.advises {
            let bytes = submission.parts.bytes() as u64;
            // A hint: the read that follows says what is wrong.
            let _hint = advise_willneed(submission.file.as_fd(), submission.offset_bytes, bytes);
        }
        self.waiting.push_back(submission);
    }

    fn start(&mut self) {}

    fn wait(&mut self, least: usize, _timeout: Duration, ended: &mut Vec<Completion<'m, T>>) {
        for _ in 0..least.clamp(1, MOST_AT_ONCE) {
            let Some(submission) = self.waiting.pop_front() else { return };
            let result = submission.carry_out();
            ended.push(Completion { submission, result });
        }
    }
}
