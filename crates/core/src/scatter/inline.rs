//! The queue for reads that do not wait for a device, or come one at a time:
//! each is done when it is pushed.

use std::os::fd::AsFd;
use std::time::Duration;

use crate::sys::file::read_parts_at;
use crate::sys::ring::{Completion, Read, ReadQueue};

#[derive(Default)]
pub(crate) struct Inline<'f, 'm> {
    ended: Option<Completion<'f, 'm>>,
}

impl<'f, 'm> ReadQueue<'f, 'm> for Inline<'f, 'm> {
    fn room(&self) -> usize {
        usize::from(self.ended.is_none())
    }

    fn in_flight(&self) -> usize {
        usize::from(self.ended.is_some())
    }

    fn push(&mut self, read: Read<'f, 'm>) {
        let result = read_parts_at(read.file.as_fd(), &read.parts, read.offset_bytes);
        self.ended = Some(Completion { read, result });
    }

    fn start(&mut self) {}

    fn wait(&mut self, _timeout: Duration, ended: &mut Vec<Completion<'f, 'm>>) {
        ended.extend(self.ended.take());
    }
}
