//! The queue for what does not wait for a device, or comes one at a time: each
//! request is carried out when it is pushed.

use std::time::Duration;

use super::{Completion, Queue, Submission};

/// A queue of one.
#[derive(Debug, Default)]
pub struct Inline<'f, 'm> {
    ended: Option<Completion<'f, 'm>>,
}

impl<'f, 'm> Queue<'f, 'm> for Inline<'f, 'm> {
    fn room(&self) -> usize {
        usize::from(self.ended.is_none())
    }

    fn in_flight(&self) -> usize {
        usize::from(self.ended.is_some())
    }

    fn push(&mut self, submission: Submission<'f, 'm>) {
        let result = submission.carry_out();
        self.ended = Some(Completion { submission, result });
    }

    fn start(&mut self) {}

    fn wait(&mut self, _least: usize, _timeout: Duration, ended: &mut Vec<Completion<'f, 'm>>) {
        ended.extend(self.ended.take());
    }
}
