//! Waiting for many bytes of files to be in the page cache, without a thread for each.
//!
//! Each wait is a read of one byte by a ring, which ends when the page has been read. The byte
//! goes into memory that is never freed and never looked at. So nothing has to wait for a read
//! that is no longer needed.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU8;
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{opcode, IoUring};
use rustix::io::Errno;

use super::call::{enter, errno_of, Call};

/// Bytes that are waited for at once, at most.
pub const MOST_ARRIVALS: usize = 64;

/// How often a submission that finds no memory is made again.
const AGAIN_LIMIT: u32 = 64;
/// Where the bytes go. Whoever reads them, reads what he does not know.
static BYTE: AtomicU8 = AtomicU8::new(0);

/// The waits in progress.
struct Wanted<T> {
    /// Open until its byte was seen to arrive.
    file: Arc<OwnedFd>,
    /// None when it is not of interest any more.
    value: Option<T>,
}

/// Bytes that are waited for, each with a value that comes back when it has arrived.
pub struct Arrivals<T> {
    ring: IoUring,
    wanted: Vec<Option<Wanted<T>>>,
    free: Vec<usize>,
}

impl<T> std::fmt::Debug for Arrivals<T> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Arrivals").field("free", &self.free.len()).finish_non_exhaustive()
    }
}

impl<T> Arrivals<T> {
    /// Sets the ring up.
    ///
    /// # Errors
    /// Where the kernel gives none: ENOSYS, EPERM, ENOMEM.
    pub fn new() -> Result<Self, Errno> {
        enter(Call::RingSetup)?;
        let ring = IoUring::new(MOST_ARRIVALS as u32).map_err(|error| errno_of(&error))?;
        // Before 5.7 a thread of the kernel's waits for each page.
        if !ring.params().is_feature_fast_poll() {
            return Err(Errno::NOSYS);
        }
        let wanted = std::iter::repeat_with(|| None).take(MOST_ARRIVALS).collect();
        Ok(Self { ring, wanted, free: (0..MOST_ARRIVALS).rev().collect() })
    }

    /// Readable when something has arrived.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Begins to wait for the byte at `offset_bytes` of a file, with the next
    /// [`start`](Self::start).
    ///
    /// # Errors
    /// The value, while [as many](MOST_ARRIVALS) as may be are waited for.
    pub fn push(&mut self, file: Arc<OwnedFd>, offset_bytes: u64, value: T) -> Result<(), T> {
        let Some(number) = self.free.pop() else { return Err(value) };
        let fd = Fd(file.as_fd().as_raw_fd());
        let entry = opcode::Read::new(fd, BYTE.as_ptr(), 1).offset(offset_bytes).build();
        let entry = entry.user_data(number as u64);
        // SAFETY: the file is kept open until the read has ended; the memory is never freed and
        // may be written by anybody at any time.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            // There are as many entries as numbers.
            self.free.push(number);
            return Err(value);
        }
        self.wanted[number] = Some(Wanted { file, value: Some(value) });
        Ok(())
    }

    /// Begins the waits that were pushed.
    ///
    /// # Errors
    /// The kernel's: none of them may end.
    pub fn start(&mut self) -> Result<(), Errno> {
        let mut again = 0;
        while !self.ring.submission().is_empty() {
            enter(Call::RingEnter)?;
            match self.ring.submit().map_err(|error| errno_of(&error)) {
                Ok(_) | Err(Errno::INTR) => {}
                // Out of memory for the moment.
                Err(Errno::AGAIN | Errno::BUSY) if again < AGAIN_LIMIT => {
                    again += 1;
                    std::thread::yield_now();
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Whether anything is waited for.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.free.len() < MOST_ARRIVALS
    }

    /// Adds the values of what has arrived, or cannot.
    pub fn take(&mut self, arrived: &mut Vec<T>) {
        for entry in self.ring.completion() {
            let number = entry.user_data() as usize;
            let Some(Wanted { file, value }) = self.wanted[number].take() else { continue };
            drop(file);
            arrived.extend(value);
            self.free.push(number);
        }
    }

    /// Forgets the values that `keep` does not want.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        for wanted in self.wanted.iter_mut().flatten() {
            wanted.value = wanted.value.take().filter(&keep);
        }
    }

    /// Waits for nothing any more: the values of what had not arrived.
    pub(crate) fn into_values(self) -> impl Iterator<Item = T> {
        self.wanted.into_iter().flatten().filter_map(|wanted| wanted.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file::memory_file;

    /// Those that are told of together come back each once, whatever is waited for meanwhile.
    #[test]
    fn what_has_arrived_comes_back_once() {
        let Ok(mut arrivals) = Arrivals::new() else { return };
        let file = Arc::new(memory_file("arrivals").expect("a memfd"));
        let mut seen = Vec::new();
        for value in 0..MOST_ARRIVALS {
            arrivals.push(Arc::clone(&file), 0, value).expect("room");
        }
        assert_eq!(arrivals.push(Arc::clone(&file), 0, 99), Err(99));
        arrivals.start().expect("a ring");
        arrivals.retain(|&value| value != 7);
        let mut arrived = Vec::new();
        while seen.len() < 2 * MOST_ARRIVALS - 1 {
            arrivals.take(&mut arrived);
            for value in arrived.drain(..) {
                seen.push(value);
                if value < MOST_ARRIVALS {
                    arrivals.push(Arc::clone(&file), 0, MOST_ARRIVALS + value).expect("room");
                }
            }
            if arrivals.free.len() == MOST_ARRIVALS {
                break;
            }
            arrivals.start().expect("a ring");
        }
        seen.sort_unstable();
        let expected = (0..2 * MOST_ARRIVALS).filter(|value| value % MOST_ARRIVALS != 7);
        assert_eq!(seen, expected.collect::<Vec<_>>());
    }
}
