//! Rows of stores that have a provider: whole pages are requested, each once.

use super::{count, Rows};
use crate::error::Result;
use crate::io::{Pace, Segment};
use crate::room::push;
use crate::store::Store;
use crate::sys::span::Span;
use crate::units::FilePage;

/// Bytes of pages that are asked for together.
const TOGETHER_BYTES: usize = 256 << 20;

/// Where bytes lie in the page that is asked for as the `page`-th, and where they go.
struct Copy {
    page: usize,
    within: usize,
    len: usize,
    to: usize,
}

impl Rows {
    /// Has what lies in stores without a file provided, and returns the rest, in its order.
    pub(super) fn provide(
        &self,
        wanted: &[Segment],
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<Vec<Segment>> {
        let shard_of = |part: &Segment| self.files.shard(part.file);
        let (mut provided, mut filed) = (Vec::new(), Vec::new());
        for part in wanted {
            let is_provided = shard_of(part).provided().is_some();
            push("take", if is_provided { &mut provided } else { &mut filed }, *part)?;
        }
        // By store: what several shards have in one page is asked for once.
        let number = |part: &Segment| shard_of(part).file_number();
        provided.sort_unstable_by_key(|part| (number(part), part.offset));
        for parts in provided.chunk_by(|one, next| number(one) == number(next)) {
            let Some(store) = shard_of(&parts[0]).provided() else { continue };
            let page_bytes = store.page_size().bytes();
            let most = (TOGETHER_BYTES / page_bytes).max(1);
            let (mut pages, mut copies): (Vec<FilePage>, Vec<Copy>) = (Vec::new(), Vec::new());
            for part in parts {
                let mut done = 0;
                while done < part.len as usize {
                    let at = part.offset + done as u64;
                    let wanted_page = FilePage(store.page_size().index_of(at));
                    let within = (at - store.page_size().bytes_of(wanted_page.0)) as usize;
                    let len = (page_bytes - within).min(part.len as usize - done);
                    if pages.last() != Some(&wanted_page) {
                        if pages.len() == most {
                            self.bring(store, &pages, &copies, into, pace)?;
                            pages.clear();
                            copies.clear();
                        }
                        pages.push(wanted_page);
                    }
                    let to = part.place + done;
                    copies.push(Copy { page: pages.len() - 1, within, len, to });
                    done += len;
                }
            }
            self.bring(store, &pages, &copies, into, pace)?;
        }
        Ok(filed)
    }

    fn bring(
        &self,
        store: &Store,
        pages: &[FilePage],
        copies: &[Copy],
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        // They rise with the pages.
        let mut take = |position: usize, content: Span<'_>| {
            let first = copies.partition_point(|copy| copy.page < position);
            for copy in copies[first..].iter().take_while(|copy| copy.page == position) {
                into.part(copy.to, copy.len).copy_span(content.part(copy.within, copy.len));
            }
        };
        store
            .provide(pages, &mut take, pace.interrupt())
            .map_err(|error| error.with_operation("take").with_completed(0))?;
        count(&self.counters.reads, 1);
        count(&self.counters.bytes_read, store.page_size().bytes_of(pages.len() as u64));
        pace.check(pages.len())
    }
}
