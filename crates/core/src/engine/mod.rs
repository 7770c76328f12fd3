//! The engines: the ways to build a window on this kernel, behind one trait.
//!
//! [`alias`] shows the file itself, with one kernel mapping for each extent. The other two show
//! copies, and share their flow ([`cached`]): [`paged`] moves them into one mapping under
//! userfaultfd and serves faults, and [`eager`] copies them into plain memory.

pub mod alias;
pub mod cached;
mod call_lock;
pub mod eager;
pub mod paged;

use std::fmt;

use rustix::io::Errno;

use crate::error::{Interrupt, Result};
use crate::memory::mappings;
use crate::plan::Changes;
use crate::room::collected;
pub(crate) use crate::room::room_for;
use crate::stats::Stats;
use crate::store::Store;
use crate::sys::mm::{Advice, OwnProcess, Region, HUGE_PAGE_BYTES};
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::table::{Entry, Shown};
use crate::trim::ReadAhead;
use crate::units::{FilePage, PageSize, Pages, Prot, WindowPage};

/// Which engine a window uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// A kernel mapping per extent; coherent.
    Alias,
    /// One anonymous mapping under userfaultfd; a cache of the store.
    Paged,
    /// Plain anonymous memory, filled at `remap`.
    Eager,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Alias => "alias",
            Self::Paged => "paged",
            Self::Eager => "eager",
        })
    }
}

/// Who resolves the faults of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultMode {
    /// The service; who touches an absent page waits for it.
    Thread,
    /// The thread that touches the page, in a handler of SIGBUS.
    Signal,
}

/// Which content a remap brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// All of it, waiting for I/O.
    All,
    /// What is in the page cache.
    Resident,
    /// None; a touch will.
    Nothing,
}

/// How to remap.
#[derive(Clone, Copy, Debug)]
pub struct RemapOptions {
    /// New protection of the changed pages.
    pub prot: Option<Prot>,
    /// Which content is brought.
    pub fill: Fill,
    /// Placed pages may be lost.
    pub discard: bool,
    /// No thread reads the pages meanwhile, so their frames may be overwritten.
    pub in_place: bool,
}

/// What every engine does. Selections are checked against the window and the
/// store before they come here; masks have a bool for each selected page.
pub trait Engine: Send + Sync + fmt::Debug {
    /// The window's memory.
    fn region(&self) -> &Region;

    /// How the kernel reads ahead, where it does.
    fn read_ahead(&self) -> Option<ReadAhead> {
        None
    }

    /// Leaves a part of the budget to others, where it is the window's own.
    fn lower_budget(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// Bytes that it would take with all of its pages, where the budget is less.
    fn whole_bytes(&self) -> Option<u64> {
        None
    }

    /// Changes what window pages show.
    fn remap(
        &self,
        changes: &Changes,
        options: RemapOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>>;

    /// Makes pages present: all, or those in the page cache.
    fn populate(
        &self,
        pages: &Pages<WindowPage>,
        fill: Fill,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>>;

    /// Drops pages from the window.
    fn evict(
        &self,
        pages: &Pages<WindowPage>,
        discard: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<()>;

    /// Changes the protection of pages and keeps their content.
    fn protect(
        &self,
        pages: &Pages<WindowPage>,
        prot: Prot,
        interrupt: &dyn Interrupt,
    ) -> Result<()>;

    /// Gives pages content of their own: `data` (one page for all, or as many
    /// bytes as the pages have), or what they show now.
    fn place(
        &self,
        pages: &Pages<WindowPage>,
        data: Option<&[u8]>,
        interrupt: &dyn Interrupt,
    ) -> Result<()>;

    /// Writes changed pages to the store, to the point of being durable.
    fn flush(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<()>;

    /// Takes into pages what the store has of them since it had `had_bytes`, where they were
    /// loaded when it ended within them. What was written to them up to there is written.
    /// If it fails, the next call goes on with it.
    fn reload_grown(&self, _had_bytes: u64, _interrupt: &dyn Interrupt) -> Result<()> {
        Ok(())
    }

    /// Which of `pages` have content that the store does not have.
    fn dirty(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<Vec<bool>>;

    /// Keeps pages, each named once, in the window, whatever its budget, until they are
    /// unpinned as often.
    fn pin(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<()>;

    /// Ends a [`pin`](Self::pin).
    fn unpin(&self, pages: &Pages<WindowPage>);

    /// Which of `pages` can be touched without a fault.
    fn present(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<Vec<bool>>;

    /// Tells the word of each of `pages`, in their order.
    fn entries(
        &self,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
        tell: &mut dyn FnMut(Entry),
    ) -> Result<()>;

    /// Counters and state.
    fn stats(&self) -> Stats;
}

/// Gives advice on ranges (offset, length): in one call where the kernel lets it, else, or when
/// that fails (a filter may have been installed since), by `each`.
pub(crate) fn advise_ranges(
    process: Option<&OwnProcess>,
    region: &Region,
    ranges: &[(usize, usize)],
    advice: Advice,
    each: impl Fn(usize, usize) -> Result<(), Errno>,
) -> Result<(), Errno> {
    if let Some(process) = process {
        if ranges.len() > 1 && process.advise(region, ranges, advice).is_ok() {
            return Ok(());
        }
    }
    ranges.iter().try_for_each(|&(offset, len)| each(offset, len))
}

/// What the memory of a window is aligned to. The kernel uses huge pages, and maps large folios of
/// a file by one entry, only where memory is aligned as they are.
pub(crate) fn alignment(bytes: usize, page: PageSize) -> usize {
    page.bytes().max(if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 })
}

/// Where the bytes of `position` of a selection are in what `place` was given.
pub(crate) fn placed_bytes(data: &[u8], position: usize, page_bytes: usize) -> &[u8] {
    if data.len() == page_bytes {
        data
    } else {
        &data[position * page_bytes..][..page_bytes]
    }
}

/// The content of a file page.
pub(crate) fn content_of(
    store: &Store,
    operation: &'static str,
    file_page: FilePage,
) -> Result<Vec<u8>> {
    let mut content = collected(operation, std::iter::repeat_n(0, store.page_size().bytes()))?;
    store.read_page(file_page, Span::of(&mut content))?;
    Ok(content)
}

/// What to do if a window's memory cannot be mapped.
pub(crate) fn memory_hint(locked: bool) -> &'static str {
    if locked {
        "; lock=True is charged to RLIMIT_MEMLOCK (window and staging memory): raise it with \
         `ulimit -l`, or map fewer pages"
    } else {
        "; `fremap doctor` says what this process may do and how to get what is missing"
    }
}

/// Says why a touch of a page is a signal.
pub(crate) fn tell_why(page: WindowPage, entry: Entry, signal: &str, reason: fmt::Arguments<'_>) {
    let page = page.0;
    match entry.shown() {
        Shown::File(file) => stderr_line(format_args!(
            "window page {page} (file page {}): {reason}; the touch raises {signal}",
            file.0
        )),
        Shown::Nothing => {
            stderr_line(format_args!(
                "window page {page} (no file page): {reason}; the touch raises {signal}"
            ));
        }
        Shown::Placed => stderr_line(format_args!(
            "window page {page} (placed content): {reason}; the touch raises {signal}"
        )),
    }
}
