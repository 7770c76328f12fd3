//! The queue for reads that do not wait for a device, or come one at a time:
//! each is done when it is pushed.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::sys::file::read_parts_at;
use crate::sys::ring::{Completion, Read, ReadQueue};

pub(super) struct Inline<'f, 'm> {
    fd: BorrowedFd<'f>,
    ended: Option<Completion<'m>>,
}

impl<'f> Inline<'f, '_> {
    pub(super) fn new(fd: BorrowedFd<'f>) -> Self {
        Self { fd, ended: None }
    }
}

impl<'m> ReadQueue<'m> for Inline<'_, 'm> {
    fn room(&self) -> usize {
        usize::from(self.ended.is_none())
    }

    fn in_flight(&self) -> usize {
        usize::from(self.ended.is_some())
    }

    fn push(&mut self, read: Read<'m>) {
        let result = read_parts_at(self.fd, &read.parts, read.offset_bytes);
        self.ended = Some(Completion { read, result });
    }

    fn start(&mut self) {}

    fn wait(&mut self, _timeout: Duration, ended: &mut Vec<Completion<'m>>) {
        ended.extend(self.ended.take());
    }
}
