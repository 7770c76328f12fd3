//! Waiting for many descriptors at once (`epoll`).

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{epoll, Timespec};
use rustix::io::Errno;

use super::call::{enter, Call};

/// Descriptors that one wait reports, at most.
const MOST_EVENTS: usize = 16;

/// Descriptors of the process, each with a name by which [`wait`](Self::wait) tells of it.
#[derive(Debug)]
pub struct Poller(OwnedFd);

impl Poller {
    /// One that waits for nothing yet.
    ///
    /// # Errors
    /// EMFILE at the limit of descriptors.
    pub fn new() -> Result<Self, Errno> {
        enter(Call::Open)?;
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Tells of `fd` by `name` while it can be read.
    ///
    /// # Errors
    /// ENOMEM; ENOSPC at the limit of watches.
    pub fn add(&self, fd: impl AsFd, name: u64) -> Result<(), Errno> {
        epoll::add(&self.0, fd, epoll::EventData::new_u64(name), epoll::EventFlags::IN)
    }

    /// Tells of it no more. A descriptor that is closed while a copy of it is open (in a child of
    /// fork, say) has to be removed first.
    ///
    /// # Errors
    /// ENOENT where it was not added.
    pub fn remove(&self, fd: impl AsFd) -> Result<(), Errno> {
        epoll::delete(&self.0, fd)
    }

    /// Adds the names of descriptors that can be read to `ready`; waits until one can, unless
    /// only to look `at_once`. May return without any.
    ///
    /// # Errors
    /// None that a valid descriptor is known to give.
    pub fn wait(&self, at_once: bool, ready: &mut Vec<u64>) -> Result<(), Errno> {
        let timeout = at_once.then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        let none =
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [none; MOST_EVENTS];
        match epoll::wait(&self.0, &mut events[..], timeout.as_ref()) {
            Ok(count) => ready.extend(events[..count].iter().map(|event| event.data.u64())),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::thread::Event;
    use super::*;

    #[test]
    fn descriptors_are_told_of_by_their_names_until_they_are_removed() {
        let poller = Poller::new().unwrap();
        let (first, second) = (Event::new().unwrap(), Event::new().unwrap());
        poller.add(&first, 7).unwrap();
        poller.add(&second, 8).unwrap();
        let ready = || {
            let mut ready = Vec::new();
            poller.wait(true, &mut ready).unwrap();
            ready.sort_unstable();
            ready
        };
        assert_eq!(ready(), []);
        second.set();
        assert_eq!(ready(), [8]);
        first.set();
        assert_eq!(ready(), [7, 8]);
        second.clear();
        assert_eq!(ready(), [7]);
        poller.remove(&first).unwrap();
        assert_eq!(ready(), []);
    }
}
