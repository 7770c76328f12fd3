//! Which pages of a store are in the page cache.

use rustix::io::Errno;

use super::source::{key, page_of, position_of, Query, SourceMap, PIECE_PAGES};
use super::Store;
use crate::error::{Error, Interrupt, Result, Uninterruptible};
use crate::room::room_for;
use crate::sys::cachestat;
use crate::sys::mm::system_page_bytes;
use crate::units::{FilePage, PageIndex, Pages};

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
        self.resident_until(pages, &Uninterruptible)
    }

    /// The same, where the caller can be interrupted: it is asked for each piece of
    /// 65 536 pages.
    ///
    /// # Errors
    /// As [`resident`](Self::resident); [`Error::Memory`] where there is no room for the
    /// answer; [`Error::Interrupted`].
    pub fn resident_until(
        &self,
        pages: &Pages<FilePage>,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let mut mask: Vec<bool> = room_for("resident", pages.len())?;
        let mut keys: Vec<u64> = room_for("resident", pages.len().min(PIECE_PAGES))?;
        for start in (0..pages.len()).step_by(PIECE_PAGES) {
            interrupt.check()?;
            let end = pages.len().min(start + PIECE_PAGES);
            mask.resize(end, false);
            if let Some(provider) = &self.provider {
                for (position, here) in (start..end).zip(&mut mask[start..]) {
                    *here = provider.ahead.has(pages.at(position));
                }
                continue;
            }
            if self.size_bytes() == 0 {
                continue;
            }
            keys.clear();
            keys.extend((start..end).map(|request| key(pages.at(request).0, request - start)));
            if !keys.is_sorted() {
                keys.sort_unstable();
            }
            let mut rest = &mut keys[..];
            while let Some(&first) = rest.first() {
                let part = self.parts.index_of(FilePage(page_of(first)));
                let group;
                (group, rest) = self.parts.split_keys(part, rest);
                self.ask_residency(part, group, |position, here| mask[start + position] = here)?;
            }
        }
        Ok(mask)
    }

    /// Whether `mincore` tells this process the truth about the file of a part.
    pub(crate) fn tells_residency(&self, part: usize) -> bool {
        cachestat::tells_residency(self.parts.all()[part].fd()).unwrap_or(false)
    }

    /// The source map of a part, where its file can be mapped.
    pub(crate) fn source_map(
        &self,
        index: usize,
    ) -> std::result::Result<std::sync::Arc<SourceMap>, Errno> {
        let part = &self.parts.all()[index];
        part.source.map(part.fd(), self.part_bytes(index), &self.mapped)
    }

    /// Asks about pages of one part; the keys have the pages of its file.
    fn ask_residency(
        &self,
        index: usize,
        keys: &[u64],
        mut answer: impl FnMut(usize, bool),
    ) -> Result<()> {
        let part = &self.parts.all()[index];
        let fail = |errno| Self::part_error("resident", part, errno);
        if !self.tells_residency(index) {
            return Err(Error::Unsupported { operation: "resident", reason: UNTOLD.into() });
        }
        let unmapped = match self.source_map(index) {
            Ok(map) => {
                let mut query = Query::default();
                return map.residency(keys, self.page_size(), &mut query, answer).map_err(fail);
            }
            Err(errno) => errno,
        };
        // A file that cannot be mapped can still be asked about page by page.
        for &key in keys {
            let page = part.first.offset(page_of(key));
            let bytes = self.expected_bytes(page);
            let offset = part.offset_of(page, self.page_size());
            let cached = cachestat::cached_pages(part.fd(), offset, bytes as u64);
            // Before Linux 6.5 there is only the map: what is wrong with it is the error.
            let cached = cached
                .map_err(|errno| fail(if errno == Errno::NOSYS { unmapped } else { errno }))?;
            let wanted = bytes.div_ceil(system_page_bytes()) as u64;
            answer(position_of(key), bytes > 0 && cached >= wanted);
        }
        Ok(())
    }
}
