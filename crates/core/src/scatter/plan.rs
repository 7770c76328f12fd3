//! Which pages of a read are copied from the source map, and which are read.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::io::Pace;
use crate::store::source::{key, page_of, position_of, Query, SourceMap, CHUNK_BYTES, PIECE_PAGES};
use crate::store::Store;
use crate::sys::span::Span;
use crate::units::{FilePage, PageSize};

/// What matters more where both ways are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preference {
    /// Pages that are not in a populated part of the source map are read by requests.
    Speed,
    /// Whatever is in the page cache is copied from the map: a read of a cached
    /// page may make the kernel read ahead, a copy never does.
    NoDevice,
}

/// The source maps of a store's parts, each looked up once in a read.
pub(super) struct Maps<'s> {
    store: &'s Store,
    /// Whether a part's was looked up, and what was found.
    found: Vec<(bool, Option<Arc<SourceMap>>)>,
}

impl<'s> Maps<'s> {
    pub(super) fn new(store: &'s Store) -> Self {
        Self { store, found: vec![(false, None); store.parts().all().len()] }
    }

    /// The map of a part, if there is one and `mincore` answers for it.
    pub(super) fn of(&mut self, part: usize) -> Option<&Arc<SourceMap>> {
        let store = self.store;
        let (looked_up, map) = &mut self.found[part];
        if !std::mem::replace(looked_up, true) {
            let mappable = store.page_size().bytes() <= CHUNK_BYTES && store.tells_residency(part);
            *map = if mappable { store.source_map(part).ok() } else { None };
        }
        map.as_ref()
    }

    /// The map with a page that the plan says is to be copied, and where the page is.
    pub(super) fn source(&self, page: FilePage) -> Option<Span<'_>> {
        let (parts, page_size) = (self.store.parts(), self.store.page_size());
        let index = parts.index_of(page);
        let map = self.found[index].1.as_ref()?;
        map.bytes(parts.all()[index].offset_of(page, page_size), page_size.bytes())
    }
}

/// The plan for a stretch of requests.
#[derive(Default)]
pub(super) struct Plan {
    requests: Range<usize>,
    copied: Vec<bool>,
    /// Requests that will be read by system calls.
    pub(super) read_count: usize,
    keys: Vec<u64>,
    asked: Vec<u64>,
    query: Query,
}

impl Plan {
    /// The requests that the plan is for.
    pub(super) fn requests(&self) -> Range<usize> {
        self.requests.clone()
    }

    /// Whether a request is copied from the source map.
    pub(super) fn is_copied(&self, request: usize) -> bool {
        self.copied[request - self.requests.start]
    }

    /// Plans for `requests` of `pages`. Where there is no map they are read.
    pub(super) fn make(
        &mut self,
        maps: &mut Maps<'_>,
        pages: &[FilePage],
        requests: Range<usize>,
        preference: Preference,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        self.copied.clear();
        self.copied.resize(requests.len(), false);
        self.read_count = requests.len();
        self.requests = requests.clone();
        for start in requests.clone().step_by(PIECE_PAGES) {
            let end = requests.end.min(start + PIECE_PAGES);
            self.ask(maps, &pages[start..end], start, preference, pace)?;
        }
        self.read_count = self.copied.iter().filter(|&&copied| !copied).count();
        Ok(())
    }

    fn ask(
        &mut self,
        maps: &mut Maps<'_>,
        pages: &[FilePage],
        start: usize,
        preference: Preference,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let mut keys = std::mem::take(&mut self.keys);
        keys.clear();
        keys.extend(pages.iter().enumerate().map(|(position, page)| key(page.0, position)));
        if !keys.is_sorted() {
            keys.sort_unstable();
        }
        let (parts, page_size) = (maps.store.parts(), maps.store.page_size());
        let mut rest = &mut keys[..];
        while let Some(&first) = rest.first() {
            let part = parts.index_of(FilePage(page_of(first)));
            let own;
            (own, rest) = parts.split_keys(part, rest);
            let Some(map) = maps.of(part) else { continue };
            // A last page that is not whole is read, so that its end is zeros
            // whatever others left in memory there.
            let whole_pages = page_size.index_of(map.size_bytes());
            let whole = own.partition_point(|&key| page_of(key) < whole_pages);
            self.ask_part(map, page_size, &own[..whole], start, preference, pace)?;
        }
        self.keys = keys;
        Ok(())
    }

    /// The same for sorted keys of the pages of one file.
    fn ask_part(
        &mut self,
        map: &SourceMap,
        page_size: PageSize,
        keys: &[u64],
        start: usize,
        preference: Preference,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let copied = &mut self.copied[start - self.requests.start..];
        self.asked.clear();
        let chunk_of = |key: u64| (page_size.bytes_of(page_of(key)) / CHUNK_BYTES as u64) as usize;
        for group in keys.chunk_by(|&one, &other| chunk_of(one) == chunk_of(other)) {
            let chunk = chunk_of(group[0]);
            if map.is_populated(chunk) {
                self.asked.extend_from_slice(group);
                continue;
            }
            pace.check(0)?;
            if map.note_reads(chunk, group.len())
                && map.has_room(chunk)
                && map
                    .populate_around(page_size.bytes_of(page_of(group[0])), &mut self.query)
                    .is_some()
            {
                for &key in group {
                    copied[position_of(key)] = true;
                }
            } else if preference == Preference::NoDevice {
                self.asked.extend_from_slice(group);
            }
        }
        let answer = |position: usize, resident: bool| copied[position] |= resident;
        // What the kernel does not answer is read.
        let answered = map.residency(&self.asked, page_size, &mut self.query, answer).is_ok();
        for group in self.asked.chunk_by(|&one, &other| chunk_of(one) == chunk_of(other)) {
            if answered && !group.iter().any(|&key| copied[position_of(key)]) {
                map.note_absent(chunk_of(group[0]));
            }
        }
        Ok(())
    }
}
