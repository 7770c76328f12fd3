//! How pages get into a window's memory and out of it: the difference between the engines.

use rustix::io::Errno;

use crate::sys::mm::Region;
use crate::sys::span::Span;
use crate::sys::uffd::Partial;

/// What is in a range of the window before it is filled.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    /// A page of it may be present.
    pub present: bool,
    /// A page of it is set to SIGBUS.
    pub unreadable: bool,
}

/// How a range was filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The staging frames are in the window now, and those that were in the
    /// window in the spare memory.
    Moved,
    /// Frames that came out of the window are in it again, with what was staged.
    Reused,
    /// The staging memory still has its frames.
    Copied,
}

/// How writes to a window's pages are noticed. `dirty.rs` finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The first write to a page is a fault, and fremap serves it (`tracking="sync"`).
    Faults,
    /// The kernel sets a bit in the page table (`tracking="async"`).
    Kernel,
    /// The content is compared with what was loaded, by its hash.
    Content,
}

/// How pages get into a window's memory and out of it: what every engine of copies can do.
/// Ranges are (offset, length) in bytes. Who changes what pages show has the table's guard
/// meanwhile, and changes the table in the same step.
pub trait Frames: Send + Sync + std::fmt::Debug + 'static {
    /// The window's memory.
    fn region(&self) -> &Region;

    /// Whether the window's and staging memory are locked.
    fn locked(&self) -> bool;

    /// How writes are noticed; None in a window that is only read.
    fn tracking(&self) -> Option<Tracking>;

    /// What the memory can do besides because it is under a userfaultfd, where it is: there
    /// a touch of an absent page brings it.
    fn userfault(&self) -> Option<&dyn Userfault>;

    /// Replaces the pages at `offset` by `from`; the old frames go to `spare`.
    /// `track`: writes to it are noticed.
    /// Fails with where it stopped: pages behind that are absent.
    fn fill(
        &self,
        offset: usize,
        from: Span<'_>,
        spare: Option<Span<'_>>,
        before: Before,
        track: bool,
    ) -> Result<Filled, Partial>;

    /// Makes pages absent.
    /// Where it fails, some may be absent.
    fn drop_pages(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;

    /// Makes pages absent and a touch of them a signal.
    /// Where it fails, some may be absent.
    fn deny(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;

    /// Takes back [`deny`](Self::deny): pages are absent.
    fn allow(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;
}

/// What memory under a userfaultfd can do: its frames move, and writes to it are noticed.
pub trait Userfault: Frames {
    /// Prepares staging memory of chunks of `chunk_bytes`, and says whether
    /// [`fill`](Frames::fill) wants spare memory of the same size.
    fn adopt_staging(&self, staging: &mut Region, chunk_bytes: usize) -> Result<bool, Errno>;

    /// Prepares memory that pages are moved out to.
    fn adopt_isolated(&self, isolated: &mut Region) -> Result<(), Errno>;

    /// Whether frames that came out of a window in which writes are noticed can go back
    /// into it with new content.
    fn reuses(&self) -> bool;

    /// Moves present frames into absent pages of the window, where writes to them go
    /// unnoticed until [`notice_writes`](Self::notice_writes).
    /// Fails with where it stopped: pages behind that are absent.
    fn move_frames(&self, offset: usize, from: Span<'_>) -> Result<Filled, Partial>;

    /// Moves present pages out of the window to empty memory, as they are.
    /// Where it fails, they may be in either place.
    fn move_out(&self, offset: usize, to: Span<'_>) -> Result<(), Errno>;

    /// Moves pages back that [`move_out`](Self::move_out) has moved, where they were:
    /// they count as written to. Those that never left stay.
    fn move_back(&self, offset: usize, from: Span<'_>) -> Result<(), Errno>;

    /// Moves what frames `from` has to empty [staging](Self::adopt_staging) memory or
    /// [isolated memory](Self::adopt_isolated); says whether it could.
    fn shift(&self, to: Span<'_>, from: Span<'_>) -> bool;

    /// Whether the kernel has all of a range of the window, or of other memory under the
    /// userfaultfd, that should be present: somebody may have dropped it behind our back.
    fn has(&self, memory: Span<'_>) -> Result<bool, Errno>;

    /// Notices the next writes to present pages, and takes them for clean.
    fn notice_writes(&self, ranges: &[(usize, usize)]) -> Result<(), Errno>;

    /// Adds the ranges (from `offset` on) that were written to, where the kernel notes
    /// them. `protect`: notices writes again.
    fn written(
        &self,
        offset: usize,
        len: usize,
        protect: bool,
        written: &mut Vec<(usize, usize)>,
    ) -> Result<(), Errno>;

    /// Wakes the threads that wait for pages, to look again.
    fn wake(&self, ranges: &[(usize, usize)]);

    /// Whether the kernel gives page tables back of blocks that are dropped whole.
    fn reclaims_page_tables(&self) -> bool;
}
