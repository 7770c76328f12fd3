//! What of a store is in the page cache.

use rustix::io::Errno;

use super::source::{Query, SourceMap};
use super::Store;
use crate::error::{Error, Result};
use crate::sys::file as sys_file;
use crate::sys::mm::system_page_bytes;
use crate::units::{FilePage, Pages};

const UNTOLD: &str = "the kernel does not tell what is in the page cache of a file that the \
                      caller neither owns nor may write; open a file of your own, get write \
                      permission to it, or do without nonblock";

impl Store {
    /// Which pages are in the page cache, without reading any: `mincore` on the
    /// source map. A page larger than the system's is resident when all of it
    /// is. A hole of shared memory is not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel does not tell this process;
    /// [`Error::Io`].
    pub fn resident(&self, pages: &Pages<FilePage>) -> Result<Vec<bool>> {
        if !self.tells_residency() {
            return Err(Error::Unsupported { operation: "resident", reason: UNTOLD.into() });
        }
        let mut mask = vec![false; pages.len()];
        if mask.is_empty() || self.size_bytes() == 0 {
            return Ok(mask);
        }
        let mut order: Vec<u32> = Vec::new();
        let mut sorted: Vec<u64> = Vec::new();
        for start in (0..pages.len()).step_by(PIECE_PAGES) {
            let end = pages.len().min(start + PIECE_PAGES);
            sorted.clear();
            sorted.extend((start..end).map(|position| pages.at(position).0));
            let mask = &mut mask[start..end];
            if sorted.is_sorted() {
                self.ask_residency(&sorted, |position, here| mask[position] = here)?;
            } else {
                order.clear();
                order.extend(0..u32::try_from(end - start).unwrap_or(u32::MAX));
                order.sort_unstable_by_key(|&position| pages.at(start + position as usize).0);
                sorted.sort_unstable();
                self.ask_residency(&sorted, |rank, here| mask[order[rank] as usize] = here)?;
            }
        }
        Ok(mask)
    }

    /// Whether `mincore` tells this process the truth about the file.
    pub(crate) fn tells_residency(&self) -> bool {
        sys_file::tells_residency(self.fd()).unwrap_or(false)
    }

    /// The source map, where the file can be mapped.
    pub(crate) fn source_map(&self) -> std::result::Result<std::sync::Arc<SourceMap>, Errno> {
        self.source.map(self.fd(), self.size_bytes())
    }

    fn ask_residency(&self, sorted: &[u64], mut answer: impl FnMut(usize, bool)) -> Result<()> {
        let fail = |errno| self.io_error("resident", None, errno);
        if let Ok(map) = self.source_map() {
            let mut query = Query::default();
            return map.residency(sorted, self.page_size(), &mut query, answer).map_err(fail);
        }
        // A file that cannot be mapped can still be asked about page by page.
        for (position, &page) in sorted.iter().enumerate() {
            let bytes = self.expected_bytes(FilePage(page));
            let offset = self.page_size().bytes_of(page);
            let cached = sys_file::cachestat(self.fd(), offset, bytes as u64).map_err(fail)?;
            let wanted = bytes.div_ceil(system_page_bytes()) as u64;
            answer(position, bytes > 0 && cached.cached >= wanted);
        }
        Ok(())
    }
}

/// Pages that are sorted and asked about together.
const PIECE_PAGES: usize = 65_536;
