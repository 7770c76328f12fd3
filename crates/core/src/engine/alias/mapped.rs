//! What a window of engine `alias` has mapped where: everything that the trimmer needs of it.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::error;
use crate::plan::LinearRun;
use crate::room::collected;
use crate::store::Store;
use crate::sys::lock::lock;
use crate::sys::mm::{system_page_bytes, Access, Advice, Region, Sharing};
use crate::sys::pagemap::PageMap;
use crate::sys::probe::reclaims_page_tables;
use crate::sys::span::Span;
use crate::table::{Entry, Shown, Table};
use crate::trim::{ReadAhead, Trimmed};
use crate::units::{PageIndex, PageSize, Prot, Run, WindowPage};

pub(super) fn access(entry: Entry) -> Access {
    match (entry.shown(), entry.prot()) {
        (Shown::Nothing, _) | (_, Prot::None) => Access::None,
        (_, Prot::Read) => Access::Read,
        (_, Prot::Write) => Access::Write,
    }
}

/// The same runs, cut where one file of the store ends and the next begins.
pub(super) fn one_file_each(
    store: &Store,
    operation: &'static str,
    runs: impl IntoIterator<Item = LinearRun>,
) -> error::Result<Vec<LinearRun>> {
    let cut = |LinearRun { window, file }: LinearRun| {
        let run = Run { first: file, count: window.count };
        store.cut(run).map(move |piece| {
            let first = window.first.offset(piece.first.0 - file.0);
            LinearRun { window: Run { first, count: piece.count }, file: piece.first }
        })
    };
    collected(operation, runs.into_iter().flat_map(cut))
}

/// A range of memory and what it shows.
#[derive(Debug)]
pub struct AliasMapping {
    pub(super) store: Arc<Store>,
    pub(super) page: PageSize,
    pub(super) region: Region,
    pub(super) locked: bool,
    pub(super) sharing: Sharing,
    /// A [`ReadAhead`]; changes with the table locked.
    pub(super) advice: AtomicU8,
    /// The table; changes with the mappings, and is not held while pages are read.
    pub(super) table: Mutex<Table>,
}

impl AliasMapping {
    pub(super) fn bytes(&self, run: Run<WindowPage>) -> (usize, usize) {
        (self.page.bytes_of(run.first.0) as usize, self.page.bytes_of(run.count) as usize)
    }

    /// Has the kernel show what pages like `entry`, the word of the first of `run`, say: they
    /// are alike but for consecutive file pages, of one file.
    pub(super) fn map(&self, entry: Entry, run: Run<WindowPage>) -> Result<(), Errno> {
        let (offset, len) = self.bytes(run);
        match entry.shown() {
            Shown::File(_) => self.map_part(entry, run.first, offset..offset + len),
            Shown::Nothing => self.region.map_anonymous(offset, len, Access::None),
            Shown::Placed => self.region.protect(offset, len, access(entry)),
        }
    }

    /// System pages of files that are mapped, and bytes of their page tables.
    pub(super) fn resident(&self) -> Result<(u64, u64), Errno> {
        let page = system_page_bytes();
        let block = page * (page / size_of::<u64>());
        let memory = self.memory();
        let start = memory.start() as usize;
        let (mut pages, mut tables, mut counted) = (0, 0, 0);
        PageMap::open()?.file_pages(memory, |offset, len| {
            pages += len / page;
            let first = ((start + offset) / block).max(counted);
            let end = (start + offset + len).div_ceil(block);
            tables += end.saturating_sub(first);
            counted = counted.max(end);
        })?;
        Ok((pages as u64, (tables * page) as u64))
    }

    /// The runs of window pages, alike but for consecutive file pages of one file, that lie
    /// in a range of bytes; with the part of each that does.
    fn file_runs(&self, table: &Table, bytes: &Range<usize>) -> Vec<(WindowPage, Range<usize>)> {
        let page_bytes = self.page.bytes();
        let end = bytes.end.div_ceil(page_bytes) as u64;
        let mut page = WindowPage((bytes.start / page_bytes) as u64);
        let mut runs = Vec::new();
        while page.0 < end {
            let entry = table.get(page);
            let Shown::File(file) = entry.shown() else {
                page = page.offset(1);
                continue;
            };
            let most = self.store.cut(Run { first: file, count: end - page.0 }).next();
            let most = most.map_or(1, |run| run.count);
            let mut count = table.original_pages(page).clamp(1, most);
            let follows = |count: u64| {
                let next = table.get(page.offset(count));
                next.shown() == Shown::File(file.offset(count)) && next.prot() == entry.prot()
            };
            while count < most && follows(count) {
                count += 1;
            }
            let (offset, len) = self.bytes(Run { first: page, count });
            runs.push((page, offset.max(bytes.start)..(offset + len).min(bytes.end)));
            page = page.offset(count);
        }
        runs
    }

    /// Maps a part of a run of file pages, of which `entry` is the word of the first. What was
    /// mapped there goes, page tables and all.
    fn map_part(&self, entry: Entry, first: WindowPage, bytes: Range<usize>) -> Result<(), Errno> {
        let Some(file) = entry.shown().file_page() else { return Ok(()) };
        let (fd, file_offset) = self.store.place_of(file);
        let within = bytes.start as u64 - self.page.bytes_of(first.0);
        let place = file_offset + within;
        let access = access(entry);
        self.region.map_file(self.sharing, bytes.start, bytes.len(), fd, place, access)?;
        if self.read_ahead() != ReadAhead::Normal {
            self.region.advise(bytes.start, bytes.len(), advice_of(self.read_ahead()))?;
        }
        Ok(())
    }

    /// How the kernel reads ahead.
    pub(super) fn read_ahead(&self) -> ReadAhead {
        match self.advice.load(Ordering::Relaxed) {
            advice if advice == ReadAhead::Random as u8 => ReadAhead::Random,
            advice if advice == ReadAhead::Sequential as u8 => ReadAhead::Sequential,
            _ => ReadAhead::Normal,
        }
    }
}

fn advice_of(read_ahead: ReadAhead) -> Advice {
    match read_ahead {
        ReadAhead::Normal => Advice::Normal,
        ReadAhead::Random => Advice::Random,
        ReadAhead::Sequential => Advice::Sequential,
    }
}

impl Trimmed for AliasMapping {
    fn memory(&self) -> Span<'_> {
        self.region.span(0, self.region.len())
    }

    fn give_back(&self, pagemap: &PageMap, ranges: &[Range<usize>]) -> Result<(), Errno> {
        // Held so that nothing is placed, or shown instead, where pages are being dropped.
        let table = lock(&self.table);
        for range in ranges {
            if self.sharing == Sharing::Private {
                self.page_out(pagemap, range)?;
            } else if !reclaims_page_tables() {
                for (first, bytes) in self.file_runs(&table, range) {
                    self.map_part(table.get(first), first, bytes)?;
                }
            } else if table.counts().placed == 0 {
                self.region.advise(range.start, range.len(), Advice::DontNeed)?;
            } else {
                for (_, bytes) in self.file_runs(&table, range) {
                    self.region.advise(bytes.start, bytes.len(), Advice::DontNeed)?;
                }
            }
        }
        Ok(())
    }

    fn keeps_some(&self) -> bool {
        self.sharing == Sharing::Private
    }

    fn advise(&self, read_ahead: ReadAhead) -> Result<(), Errno> {
        let _table = lock(&self.table);
        self.region.advise(0, self.region.len(), advice_of(read_ahead))?;
        self.advice.store(read_ahead as u8, Ordering::Relaxed);
        Ok(())
    }
}

impl AliasMapping {
    /// Drops pages of the file from a private mapping. `MADV_DONTNEED` would throw away what
    /// was written, also by a thread that writes just now, for the first time; the kernel's
    /// reclaim knows which pages are the mapping's own. It takes pages that nobody else maps
    /// out of the page cache too.
    fn page_out(&self, pagemap: &PageMap, range: &Range<usize>) -> Result<(), Errno> {
        let mut of_file = Vec::new();
        let memory = self.region.span(range.start, range.len());
        pagemap.file_pages(memory, |offset, len| of_file.push((range.start + offset, len)))?;
        for (offset, len) in of_file {
            self.region.advise(offset, len, Advice::PageOut)?;
        }
        Ok(())
    }
}
