//! Waiting for bytes of files to be in the page cache, many at once and no thread for any.
//!
//! Each is a read of one byte by a ring, whose content nobody wants: it ends when its page
//! has been read. What the kernel fills is memory that is never freed, so nothing has to wait for
//! a read that is not of interest any more.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU8;
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{opcode, IoUring};
use rustix::io::Errno;

use super::call::{enter, Call};

/// Bytes that are waited for at once, at most.
pub const MOST_ARRIVALS: usize = 64;

/// Where the bytes go. Whoever reads them, reads what he does not know.
static BYTE: AtomicU8 = AtomicU8::new(0);

/// Bytes that are waited for.
pub struct Arrivals {
    ring: IoUring,
    /// The file of each that was not seen to arrive: open until then.
    files: Vec<Option<Arc<OwnedFd>>>,
    free: Vec<usize>,
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Arrivals").field("free", &self.free.len()).finish_non_exhaustive()
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Arrivals {
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
        let files = std::iter::repeat_with(|| None).take(MOST_ARRIVALS).collect();
        Ok(Self { ring, files, free: (0..MOST_ARRIVALS).rev().collect() })
    }

    /// Readable when something has arrived.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Begins to wait for the byte at `offset_bytes` of a file; says under which number, below
    /// [`MOST_ARRIVALS`]. None while as many as may be are waited for. The wait begins with
    /// [`start`](Self::start).
    pub fn push(&mut self, file: Arc<OwnedFd>, offset_bytes: u64) -> Option<usize> {
        let number = self.free.pop()?;
        let fd = Fd(file.as_fd().as_raw_fd());
        let entry = opcode::Read::new(fd, BYTE.as_ptr(), 1).offset(offset_bytes).build();
        let entry = entry.user_data(number as u64);
        // SAFETY: the file is kept open until the read has ended; the memory is never freed and
        // may be written by anybody at any time.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            // There are as many entries as numbers.
            self.free.push(number);
            return None;
        }
        self.files[number] = Some(file);
        Some(number)
    }

    /// Begins the waits that were pushed.
    ///
    /// # Errors
    /// The kernel's: none of them may end.
    pub fn start(&mut self) -> Result<(), Errno> {
        while !self.ring.submission().is_empty() {
            enter(Call::RingEnter)?;
            match self.ring.submit().map_err(|error| errno_of(&error)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Adds the numbers of what has arrived, or cannot.
    pub fn take(&mut self, arrived: &mut Vec<usize>) {
        for entry in self.ring.completion() {
            let number = entry.user_data() as usize;
            self.files[number] = None;
            self.free.push(number);
            arrived.push(number);
        }
    }
}
