//! One provider process, and the messages to it.
//!
//! A request is a message with a number and a count. The page numbers are at the front of memory
//! that both processes share, and the process writes their content behind them. One request is in
//! progress at a time. If it fails, the reason comes in the same memory.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::Said;
use crate::sys::child::{memory_to_share, Channel, Child, Ended, Program, Received};
use crate::sys::file as sys_file;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::process;
use crate::sys::span::Span;

/// Bytes of a request: its number and the count of pages.
const REQUEST_BYTES: usize = 16;
/// Bytes of a reply: the number, an errno (0 if all is well), and the lengths of three texts.
const REPLY_BYTES: usize = 24;
/// Room for what a process says of a failure.
const TEXT_BYTES: usize = 64 << 10;
/// How long a process may take from its start until it asks for work.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long a process that has hung up may take to end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// How the memory that is shared with a process is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Pages that one request may name.
    pub(super) batch_pages: usize,
    pub(super) page_bytes: usize,
}

impl Layout {
    /// Where the numbers of pages stand, and what the process says: behind what it is told
    /// when it starts.
    fn words_at() -> usize {
        system_page_bytes()
    }

    /// Bytes in front of the content.
    fn head_bytes(self) -> usize {
        let words = (self.batch_pages * size_of::<u64>()).max(TEXT_BYTES);
        (Self::words_at() + words).next_multiple_of(system_page_bytes())
    }

    fn total_bytes(self) -> usize {
        self.head_bytes() + self.batch_pages * self.page_bytes
    }
}

/// What has become of a request.
#[derive(Debug)]
pub(super) enum Progress {
    /// It is not done yet.
    UnderWay,
    /// Its content is there.
    Done,
    /// The process could not.
    Refused(Said),
    /// The process has ended.
    Ended(Ended),
    /// The process takes longer than it may.
    Late,
}

#[derive(Debug)]
pub(super) struct Worker {
    channel: Channel,
    child: Option<Child>,
    memory: OwnedFd,
    map: Region,
    layout: Layout,
    /// The process that has started it, and alone may speak with it.
    owner: u32,
    started: Instant,
    ready: Option<Instant>,
    /// The number of the last request.
    number: u64,
    /// When the request that was not answered yet was sent.
    asked: Option<Instant>,
}

impl Worker {
    /// Starts a process.
    pub(super) fn start(
        program: &Program,
        payload: &OwnedFd,
        layout: Layout,
    ) -> Result<Self, Errno> {
        let memory = memory_to_share("fremap-provider", layout.total_bytes() as u64)?;
        // What the process reads before it asks for work.
        let told = [
            layout.head_bytes() as u64,
            layout.page_bytes as u64,
            layout.batch_pages as u64,
            u64::from(process::id()),
        ];
        write(&memory, 0, told)?;
        let map = Region::file(memory.as_fd(), layout.total_bytes(), Access::Read)?;
        let (channel, theirs) = Channel::pair()?;
        let child = program.start(&[theirs.as_fd(), memory.as_fd(), payload.as_fd()])?;
        Ok(Self {
            channel,
            child: Some(child),
            memory,
            map,
            layout,
            owner: process::id(),
            started: Instant::now(),
            ready: None,
            number: 0,
            asked: None,
        })
    }

    /// The number of the process.
    pub(super) fn id(&self) -> Option<i32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it is at a request that nobody waits for any more, or was not answered yet.
    pub(super) fn is_busy(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether the process has hung up, as far as that is known without a request.
    pub(super) fn is_gone(&self) -> bool {
        self.ready.is_some()
            && self.asked.is_none()
            && self.channel.receive(&mut [0; REPLY_BYTES]) == Ok(Received::HungUp)
    }

    /// Sends a request; false if the process has hung up.
    pub(super) fn ask(&mut self, pages: &[u64]) -> Result<bool, Errno> {
        debug_assert!(self.asked.is_none(), "one request at a time");
        write(&self.memory, Layout::words_at(), pages.iter().copied())?;
        self.number += 1;
        let mut message = [0; REQUEST_BYTES];
        message[..8].copy_from_slice(&self.number.to_ne_bytes());
        message[8..].copy_from_slice(&(pages.len() as u64).to_ne_bytes());
        let sent = self.channel.send(&message)?;
        self.asked = sent.then(Instant::now);
        Ok(sent)
    }

    /// Looks what has become of the last request; waits for news, at most for `wait`.
    pub(super) fn look(&mut self, limit: Option<Duration>, wait: Duration) -> Progress {
        let began = Instant::now();
        loop {
            let mut message = [0; REPLY_BYTES];
            match self.channel.receive(&mut message) {
                Ok(Received::Message(REPLY_BYTES)) => {
                    if let Some(progress) = self.take(message) {
                        return progress;
                    }
                }
                Ok(Received::Nothing) if self.is_late(limit) => return Progress::Late,
                Ok(Received::Nothing) => {
                    let Some(left) =
                        wait.checked_sub(began.elapsed()).filter(|left| !left.is_zero())
                    else {
                        return Progress::UnderWay;
                    };
                    self.channel.wait(left);
                }
                // What is no reply comes from no provider.
                Ok(Received::HungUp | Received::Message(_)) | Err(_) => {
                    return Progress::Ended(self.end());
                }
            }
        }
    }

    /// What a message says; None for the one that says that the process asks for work.
    fn take(&mut self, message: [u8; REPLY_BYTES]) -> Option<Progress> {
        let (words, _) = message.as_chunks::<4>();
        let [low, high, errno, lengths @ ..]: [u32; REPLY_BYTES / 4] =
            std::array::from_fn(|index| u32::from_ne_bytes(words[index]));
        if (low, high, errno) == (0, 0, 0) {
            self.ready = Some(Instant::now());
            return None;
        }
        self.asked = None;
        if errno == 0 {
            return Some(Progress::Done);
        }
        let mut start = Layout::words_at();
        let [reason, traceback, pickled] = lengths.map(|len| {
            let len = (len as usize).min(self.layout.head_bytes() - start);
            start += len;
            self.map.span(start - len, len).to_vec()
        });
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Some(Progress::Refused(Said {
            errno: Errno::from_raw_os_error(errno.cast_signed()),
            reason: text(reason),
            traceback: text(traceback),
            pickled,
        }))
    }

    fn is_late(&self, limit: Option<Duration>) -> bool {
        match (self.ready, self.asked) {
            (None, _) => self.started.elapsed() > START_LIMIT,
            (Some(ready), Some(asked)) => {
                limit.is_some_and(|limit| ready.max(asked).elapsed() > limit)
            }
            (Some(_), None) => false,
        }
    }

    /// How it has ended, which it is made to if it has not.
    fn end(&mut self) -> Ended {
        let Some(child) = &self.child else { return Ended::Unknown };
        let ended = child.wait(END_LIMIT).or_else(|| {
            child.kill();
            child.wait(END_LIMIT)
        });
        if ended.is_some() {
            self.child = None;
        }
        ended.unwrap_or(Ended::Unknown)
    }

    /// Ends it, whatever it is doing.
    pub(super) fn kill(self) {
        if let Some(child) = &self.child {
            child.kill();
        }
    }

    /// The content of the last request that is done.
    pub(super) fn content(&self, position: usize) -> Span<'_> {
        let start = self.layout.head_bytes() + position * self.layout.page_bytes;
        self.map.span(start, self.layout.page_bytes)
    }
}

/// Writes words to shared memory.
fn write(memory: &OwnedFd, at: usize, words: impl IntoIterator<Item = u64>) -> Result<(), Errno> {
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
    sys_file::write_at(memory.as_fd(), Span::of(&mut bytes), at as u64)
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A child of fork has the connection too, but it is its parent's.
        if self.owner == process::id() {
            self.channel.hang_up();
            if let Some(child) = self.child.take() {
                child.retire();
            }
        }
    }
}
