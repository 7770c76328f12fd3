//! Frames of pages that have left a window for others, in which these come (decision 012).

use rustix::io::Errno;

use super::frames::{Filled, Userfault};
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::sys::uffd::Partial;
use crate::units::PageSize;

/// A run of fewer system pages is dropped and copied sooner than moved.
const LEAST_RUN: usize = 8;

/// Memory that runs of pages are moved out to, and in again with other content. Its first
/// `kept_bytes` have frames, perhaps with holes; the rest is empty.
#[derive(Debug)]
pub struct FreeFrames {
    region: Region,
    kept_bytes: usize,
}

impl FreeFrames {
    /// Memory for the frames of `page_count` pages of a window in which stores are not noticed.
    ///
    /// # Errors
    /// ENOMEM; the kernel's.
    pub fn new(frames: &dyn Userfault, page: PageSize, page_count: u64) -> Result<Self, Errno> {
        let bytes = page.bytes_of(page_count) as usize;
        let mut region = Region::anonymous(bytes, system_page_bytes(), Access::Write)?;
        frames.adopt_isolated(&mut region)?;
        Ok(Self { region, kept_bytes: 0 })
    }

    /// Takes what of a run of present pages there is room for, the run's front; says how
    /// many bytes. They are absent then.
    pub(super) fn take(&mut self, frames: &dyn Userfault, (offset, len): (usize, usize)) -> usize {
        let len = len.min(self.region.len() - self.kept_bytes);
        if len < LEAST_RUN * system_page_bytes() {
            return 0;
        }
        let to = self.region.span(self.kept_bytes, len);
        if !frames.shift(to, frames.region().span(offset, len)) {
            self.free(frames, self.kept_bytes, len);
            return 0;
        }
        self.kept_bytes += len;
        len
    }

    /// Memory for `len` bytes, if it has frames for most of it.
    #[must_use]
    pub fn last(&self, len: usize) -> Option<Span<'_>> {
        let enough = len >= LEAST_RUN * system_page_bytes() && 2 * self.kept_bytes > len;
        enough.then(|| self.region.span(self.kept_bytes.saturating_sub(len), len))
    }

    /// Moves the [last](Self::last) `len` bytes, all of which were filled, into absent pages
    /// of the window at `offset`.
    ///
    /// # Errors
    /// Where it stopped; pages behind that are absent.
    pub fn put(
        &mut self,
        frames: &dyn Userfault,
        offset: usize,
        len: usize,
    ) -> Result<(), Partial> {
        self.kept_bytes = self.kept_bytes.saturating_sub(len);
        let filled = frames.move_frames(offset, self.region.span(self.kept_bytes, len));
        if !matches!(filled, Ok(Filled::Moved)) {
            self.free(frames, self.kept_bytes, len);
        }
        filled.map(|_| ())
    }

    /// Frees frames. Where that fails the next shift to there does, and pages are dropped.
    fn free(&self, frames: &dyn Userfault, at: usize, len: usize) {
        let _freed = self.region.drop_pages(at, len, frames.locked());
    }
}
