//! Requests in flight: submitting them, waiting for them, continuing short ones, ending.

use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::quota::Quota;
use crate::error::{Result, LONGEST_WAIT};
use crate::sys::file::Parts;
use crate::sys::ring::{Caller, Completion, Direction, Queue, RingPool, Submission, DEPTH};

/// Requests that all transfers of the process may have in flight together: what two that are
/// large enough may have each, and what the kernel queues for a device as a rule.
static QUOTA: Quota = Quota::new(2 * DEPTH);

/// How often a request that ended with EAGAIN or EINTR, or a write that got no further, is made
/// again.
const AGAIN_LIMIT: u8 = 8;
/// With this many in flight a device is busy …
const BUSY: usize = 32;
/// … and a wait is for several, so that each costs less.
const BUSY_WAIT: usize = 8;
/// Requests that are prepared before an idle device is told of them, where preparing one may
/// take long …
const EARLY: usize = 4;
/// … and a busy one: each telling costs a system call.
const LATER: usize = 16;

/// Who carries requests out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way<'r> {
    /// The caller, one after another: they do not wait for a device.
    Caller,
    /// The same, but the kernel is asked to read each of so many ahead.
    Advised(usize),
    /// A ring out of a pool, or threads: up to so many together.
    Together(usize, &'r RingPool),
}

/// Bytes that are to be moved.
#[derive(Debug)]
pub(crate) struct Request<N> {
    pub(crate) direction: Direction,
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) offset_bytes: u64,
    /// Bytes without which it is not whole: of a file's last block there may be fewer than
    /// there is memory for.
    pub(crate) needed_bytes: usize,
    /// What it must be a multiple of where it goes on after a short count; 1 through the page
    /// cache.
    pub(crate) align: usize,
    /// What its maker remembers of it.
    pub(crate) note: N,
}

/// What became of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    /// Bytes that were moved, from the front on.
    pub(crate) moved_bytes: usize,
    /// Whether that is all that was needed.
    pub(crate) whole: bool,
    /// Why it is not. A read that ended without is of a file that has no more.
    pub(crate) error: Option<Errno>,
}

/// What is to be moved, and what becomes of it.
pub(crate) trait Transfer<'r, 'm> {
    /// What is remembered of a request in flight.
    type Note: Send;
    /// Whether preparing a request may take long: the device is told of a few at a time then.
    const SLOW_TO_PREPARE: bool = false;
    /// Whether nothing is done with what has come before all has: the last wait is for all of it.
    const USED_TOGETHER: bool = false;

    /// Who carries the requests out. Asked once, when the first is prepared.
    fn way(&self) -> Way<'r>;

    /// Whether one more may be begun beside those in flight.
    fn may_begin(&self, _in_flight: usize, _bytes_in_flight: usize) -> bool {
        true
    }

    /// Prepares the next request, whose memory is added to `parts`; none when there is none
    /// before something has ended or was [unfolded](Self::unfold).
    ///
    /// # Errors
    /// Whatever ends the transfer.
    fn next(
        &mut self,
        in_flight: usize,
        parts: &mut Parts<'m>,
    ) -> Result<Option<Request<Self::Note>>>;

    /// Whether [`unfold`](Self::unfold) may bring more to be moved.
    fn may_unfold(&self) -> bool {
        false
    }

    /// Finds out more that is to be moved, while the device works.
    ///
    /// # Errors
    /// Whatever ends the transfer.
    fn unfold(&mut self) -> Result<()> {
        Ok(())
    }

    /// Whether all that is to be moved has been begun.
    fn all_begun(&self) -> bool;

    /// Whether a request in flight is still worth going on with.
    fn matters(&self, _note: &Self::Note) -> bool {
        true
    }

    /// A request has ended.
    ///
    /// # Errors
    /// Whatever ends the transfer.
    fn end(&mut self, note: Self::Note, ended: Ended) -> Result<()>;

    /// Asks whether the caller wants it to stop; `ended` requests have since it was asked.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::error::Error::Interrupted).
    fn check(&mut self, ended: usize) -> Result<()>;
}

/// Moves everything that `work` has. When this returns nothing is in flight.
///
/// # Errors
/// What a method of `work` has returned.
pub(crate) fn transfer<'r, 'm, W: Transfer<'r, 'm>>(work: &mut W) -> Result<()> {
    let mut flow = Flow { work, bytes: 0, spare: Vec::new(), rings: PhantomData };
    let Some(first) = flow.next(0, || ())? else { return Ok(()) };
    let (alone, no_limit) = (flow.work.all_begun(), || usize::MAX);
    match flow.work.way() {
        Way::Together(wanted, rings) if !alone => {
            let share = QUOTA.share(wanted.clamp(1, DEPTH));
            rings.together(wanted, |queue| flow.run(queue, first, &|| share.limit()))
        }
        Way::Advised(depth) if !alone => flow.run(&mut Caller::advising(depth), first, &no_limit),
        _ => flow.run(&mut Caller::one_by_one(), first, &no_limit),
    }
}

/// A request in flight.
struct Flight<N> {
    note: N,
    needed_bytes: usize,
    moved_bytes: usize,
    align: usize,
    again: u8,
}

struct Flow<'w, 'r, 'm, W: Transfer<'r, 'm>> {
    work: &'w mut W,
    /// Bytes in flight.
    bytes: usize,
    /// Memory of lists that nobody uses.
    spare: Vec<Parts<'m>>,
    rings: PhantomData<&'r RingPool>,
}

impl<'r, 'm, W: Transfer<'r, 'm>> Flow<'_, 'r, 'm, W> {
    fn run(
        &mut self,
        queue: &mut dyn Queue<'m, Flight<W::Note>>,
        first: Submission<'m, Flight<W::Note>>,
        limit: &dyn Fn() -> usize,
    ) -> Result<()> {
        let mut ended = Vec::new();
        queue.push(first);
        let mut prepared = 1;
        loop {
            while queue.room() > 0
                && queue.in_flight() < limit()
                && self.work.may_begin(queue.in_flight(), self.bytes)
            {
                let in_flight = queue.in_flight();
                let Some(next) = self.next(in_flight, || queue.start())? else { break };
                queue.push(next);
                prepared += 1;
                let few = if in_flight + 1 < BUSY { EARLY } else { LATER };
                if W::SLOW_TO_PREPARE && prepared >= few {
                    queue.start();
                    prepared = 0;
                }
            }
            let awaited = match queue.in_flight() {
                0 => {
                    debug_assert!(
                        self.work.all_begun(),
                        "nothing is in flight that more waits for"
                    );
                    return Ok(());
                }
                all if W::USED_TOGETHER && self.work.all_begun() => all,
                BUSY.. => BUSY_WAIT,
                _ => 1,
            };
            prepared = 0;
            queue.wait(awaited, LONGEST_WAIT, &mut ended);
            let count = ended.len();
            for completion in ended.drain(..) {
                self.end(completion, queue)?;
            }
            if queue.in_flight() > 0 || !self.work.all_begun() {
                self.work.check(count)?;
            }
        }
    }

    /// The next request; `start` is called before more is looked for.
    fn next(
        &mut self,
        in_flight: usize,
        mut start: impl FnMut(),
    ) -> Result<Option<Submission<'m, Flight<W::Note>>>> {
        let mut parts = self.spare.pop().unwrap_or_default();
        loop {
            if let Some(request) = self.work.next(in_flight, &mut parts)? {
                let Request { direction, file, offset_bytes, needed_bytes, align, note } = request;
                let tag = Flight { note, needed_bytes, moved_bytes: 0, align, again: 0 };
                self.bytes += parts.bytes();
                return Ok(Some(Submission { tag, direction, file, offset_bytes, parts }));
            }
            if !self.work.may_unfold() {
                self.spare.push(parts);
                return Ok(None);
            }
            start();
            self.work.unfold()?;
        }
    }

    /// Takes a request that has ended: for good, or to be gone on with from where it stopped.
    fn end(
        &mut self,
        completion: Completion<'m, Flight<W::Note>>,
        queue: &mut dyn Queue<'m, Flight<W::Note>>,
    ) -> Result<()> {
        let Completion { submission: mut request, result } = completion;
        let matters = self.work.matters(&request.tag.note);
        let result = match result {
            // The queue has failed, not the request. In a child of fork, where it always does,
            // the memory may show something else.
            Err(Errno::CANCELED) if matters => request.carry_out(),
            Err(Errno::CANCELED) => Ok(0),
            result => result,
        };
        self.bytes -= request.parts.bytes();
        let flight = &mut request.tag;
        let (goes_on, error) = match result {
            Ok(bytes) if flight.moved_bytes + bytes >= flight.needed_bytes => {
                flight.moved_bytes += bytes;
                (false, None)
            }
            Ok(bytes) => {
                let bytes = bytes - bytes % flight.align;
                flight.moved_bytes += bytes;
                request.offset_bytes += bytes as u64;
                request.parts.skip(bytes);
                match request.direction {
                    _ if bytes > 0 => (true, None),
                    Direction::Read => (false, None),
                    // It takes no more, and does not say why.
                    Direction::Write => (flight.is_tried_again(), Some(Errno::NOSPC)),
                }
            }
            Err(errno @ (Errno::AGAIN | Errno::INTR)) => (flight.is_tried_again(), Some(errno)),
            Err(errno) => (false, Some(errno)),
        };
        if goes_on && matters {
            self.bytes += request.parts.bytes();
            queue.push(request);
            return Ok(());
        }
        request.parts.clear();
        self.spare.push(request.parts);
        let Flight { note, needed_bytes, moved_bytes, .. } = request.tag;
        let whole = moved_bytes >= needed_bytes;
        self.work.end(note, Ended { moved_bytes, whole, error: error.filter(|_| !goes_on) })
    }
}

impl<N> Flight<N> {
    /// Whether it is made again after an end that has moved nothing.
    fn is_tried_again(&mut self) -> bool {
        self.again += 1;
        self.again <= AGAIN_LIMIT
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::file::{memory_file, truncate};
    use crate::sys::span::Span;

    /// Reads of ten bytes each, of a file that may be shorter.
    struct Reads<'r, 'm> {
        rings: &'r RingPool,
        file: Arc<OwnedFd>,
        memory: Span<'m>,
        begun: usize,
        most_in_flight: usize,
        ended: Vec<(usize, Ended)>,
    }

    impl<'r, 'm> Transfer<'r, 'm> for Reads<'r, 'm> {
        type Note = usize;

        fn way(&self) -> Way<'r> {
            Way::Together(DEPTH, self.rings)
        }

        fn next(
            &mut self,
            in_flight: usize,
            parts: &mut Parts<'m>,
        ) -> Result<Option<Request<usize>>> {
            if self.all_begun() {
                return Ok(None);
            }
            self.most_in_flight = self.most_in_flight.max(in_flight + 1);
            let (note, at, file) = (self.begun, 10 * self.begun, Arc::clone(&self.file));
            self.begun += 1;
            parts.push(self.memory.part(at, 10));
            let (direction, offset_bytes) = (Direction::Read, at as u64);
            Ok(Some(Request { direction, file, offset_bytes, needed_bytes: 10, align: 1, note }))
        }

        fn all_begun(&self) -> bool {
            10 * self.begun == self.memory.len()
        }

        fn end(&mut self, note: usize, ended: Ended) -> Result<()> {
            self.ended.push((note, ended));
            Ok(())
        }

        fn check(&mut self, _ended: usize) -> Result<()> {
            Ok(())
        }
    }

    /// What becomes of so many reads of a file, and how many were in flight together.
    fn read(count: usize, file_bytes: u64) -> (Vec<(usize, Ended)>, usize) {
        let (rings, mut memory) = (RingPool::new(), vec![0; 10 * count]);
        let file = Arc::new(memory_file("transfer").expect("a memfd"));
        truncate(file.as_fd(), file_bytes).expect("made longer");
        let memory = Span::of(&mut memory);
        let (begun, most_in_flight, ended) = (0, 0, Vec::new());
        let mut reads = Reads { rings: &rings, file, memory, begun, most_in_flight, ended };
        transfer(&mut reads).expect("nothing of it fails");
        reads.ended.sort_by_key(|(note, _)| *note);
        (reads.ended, reads.most_in_flight)
    }

    #[test]
    fn each_request_ends_once_and_says_where_the_file_does() {
        let (ended, _) = read(300, 2995);
        assert!(ended.iter().map(|(note, _)| *note).eq(0..300));
        assert!(ended[..299].iter().all(|(_, ended)| ended.whole && ended.moved_bytes == 10));
        let (_, last) = ended[299];
        assert_eq!((last.whole, last.moved_bytes, last.error), (false, 5, None));
    }

    #[test]
    fn transfers_share_what_the_process_may_have_in_flight() {
        let others = [QUOTA.share(3 * DEPTH), QUOTA.share(4 * DEPTH)];
        let (ended, most_in_flight) = read(300, 3000);
        assert_eq!(ended.len(), 300);
        assert!(most_in_flight <= DEPTH / 4, "{most_in_flight}");
        drop(others);
    }
}
