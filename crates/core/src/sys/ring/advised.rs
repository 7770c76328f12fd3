//! The queue for a few reads through the page cache: the kernel is asked to read each ahead
//! when it is pushed, and they are carried out one after another once somebody waits.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::Duration;

use super::super::file::advise_willneed;
use super::{Completion, Queue, Submission};

/// Reads that a wait carries out before the caller's interrupt is asked.
const MOST_AT_ONCE: usize = 8;

/// A queue of so many reads.
#[derive(Debug)]
pub struct Advised<'f, 'm> {
    waiting: VecDeque<Submission<'f, 'm>>,
    depth: usize,
}

impl Advised<'_, '_> {
    /// No read yet, and `depth` at most.
    #[must_use]
    pub fn new(depth: usize) -> Self {
        Self { waiting: VecDeque::with_capacity(depth), depth }
    }
}

impl<'f, 'm> Queue<'f, 'm> for Advised<'f, 'm> {
    fn room(&self) -> usize {
        self.depth - self.waiting.len()
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn push(&mut self, submission: Submission<'f, 'm>) {
        let bytes = submission.parts.bytes() as u64;
        // A hint: the read that follows says what is wrong.
        let _hint = advise_willneed(submission.file.as_fd(), submission.offset_bytes, bytes);
        self.waiting.push_back(submission);
    }

    fn start(&mut self) {}

    fn wait(&mut self, least: usize, _timeout: Duration, ended: &mut Vec<Completion<'f, 'm>>) {
        for _ in 0..least.clamp(1, MOST_AT_ONCE) {
            let Some(submission) = self.waiting.pop_front() else { return };
            let result = submission.carry_out();
            ended.push(Completion { submission, result });
        }
    }
}
