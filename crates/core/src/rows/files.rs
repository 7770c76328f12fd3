//! The files of rows: opened when they are needed, a limited number at a time.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use super::blocks::MAX_ALIGN;
use super::{ShardFile, ShardPlace};
use crate::error::{Error, Result, RowLoss};
use crate::room::room_for;
use crate::store::last_change::{LastChange, Unchanged};
use crate::store::source::{SourceMap, SourceMaps, POPULATE_READS};
use crate::store::Store;
use crate::sys::cachestat;
use crate::sys::file::{self as sys_file, Facts, OpenFlags};
use crate::sys::fork_lock::{ForkGuard, ForkLock};

/// Descriptors that are kept open at most; a quarter of what the process may have if
/// that is less. As many as files that are mapped: looking whether one has changed costs
/// eight times as much by its path.
const MAX_OPEN: u64 = 4096;

/// A file that is open.
pub(super) struct Opened {
    pub(super) file: Arc<OwnedFd>,
    /// What direct reads of it are aligned to; 1 where they go through the page cache.
    pub(super) align: u32,
}

/// Rows that follow each other in a file.
#[derive(Debug)]
pub(super) struct Shard {
    rows: Range<u64>,
    data_offset: u64,
    /// The number of the file among those of the rows, and the file.
    number: u32,
    source: Arc<RowsFile>,
}

/// A file, which may have several shards.
#[derive(Debug)]
struct RowsFile {
    path: Option<PathBuf>,
    identity: (u64, u64),
    born_ns: u64,
    size_bytes: u64,
    /// A file that stays open.
    fixed: Option<Arc<OwnedFd>>,
    /// A store that has no file.
    provided: Option<Arc<Store>>,
    open: ForkLock<Option<Arc<OwnedFd>>>,
    /// Reads go past the page cache.
    direct: bool,
    /// What they are aligned to; 0 while nobody has asked.
    align: AtomicU32,
    /// It was used since the pool looked at it.
    used: AtomicBool,
    kind: ForkLock<Option<Kind>>,
    map: ForkLock<Option<Arc<SourceMap>>>,
    /// Says whether what was copied from the map is good.
    last_change: LastChange,
    /// Rows read by system calls while there is no map.
    reads: AtomicUsize,
}

/// When the file at a path was made; 0 where that is not told.
fn birth_ns(path: &Path) -> u64 {
    sys_file::path_facts(path).map_or(0, |(_facts, born_ns)| born_ns)
}

/// What is known of a file once it was open.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// Reading it never waits for a device.
    memory_backed: bool,
    /// `mincore` tells the truth about it.
    told: bool,
    /// The kernel reads ahead what it is asked to.
    advised: bool,
}

/// What a child of fork finds held is closed here, as if it had not been opened.
fn lock<T: Default>(lock: &ForkLock<T>) -> ForkGuard<'_, T> {
    lock.lock()
}

/// What tells a file from others.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    Path(PathBuf, (u64, u64)),
    Store(*const Store),
}

/// The shards of some places, and the files that they are in, each once.
pub(super) fn shards_of(places: Vec<ShardPlace>, row_bytes: usize, direct: bool) -> Result<Files> {
    let mut numbers: HashMap<Key, u32> = HashMap::with_capacity(places.len());
    let mut sources: Vec<Arc<RowsFile>> = Vec::new();
    let mut shards: Vec<Shard> = room_for("rows", places.len())?;
    for ShardPlace { file, data_offset, row_count } in places {
        let key = match &file {
            ShardFile::Path { path, identity, .. } => Key::Path(path.clone(), *identity),
            ShardFile::Store(store) => Key::Store(Arc::as_ptr(store)),
        };
        let number = *numbers.entry(key).or_insert(sources.len() as u32);
        if number as usize == sources.len() {
            sources.push(Arc::new(RowsFile::new(file, direct)?));
        }
        let source = Arc::clone(&sources[number as usize]);
        let first_row = shards.last().map_or(0, |shard| shard.rows.end);
        shards.push(Shard::new(source, number, data_offset, first_row, row_count, row_bytes)?);
    }
    Ok(Files::new(shards, sources))
}

impl Shard {
    fn new(
        source: Arc<RowsFile>,
        number: u32,
        data_offset: u64,
        first_row: u64,
        row_count: u64,
        row_bytes: usize,
    ) -> Result<Self> {
        let size_bytes = source.size_bytes;
        let end = row_count
            .checked_mul(row_bytes as u64)
            .and_then(|bytes| bytes.checked_add(data_offset))
            .filter(|&end| end <= size_bytes);
        let rows = first_row.checked_add(row_count).filter(|&end| i64::try_from(end).is_ok());
        let (Some(_end), Some(end_row)) = (end, rows) else {
            return Err(Error::Argument(format!(
                "rows: {row_count} rows of {row_bytes} bytes from byte {data_offset} on do not \
                 fit into the {size_bytes} bytes of {}",
                source.path.as_ref().map_or("the store".into(), |path| path.display().to_string())
            )));
        };
        Ok(Self { rows: first_row..end_row, data_offset, number, source })
    }

    /// The store that the rows are in, where that has no file.
    pub(super) fn provided(&self) -> Option<&Store> {
        self.source.provided.as_deref()
    }

    pub(super) fn rows(&self) -> Range<u64> {
        self.rows.clone()
    }

    #[inline]
    pub(super) fn has(&self, row: u64) -> bool {
        self.rows.contains(&row)
    }

    /// The number of the file that it is in.
    #[inline]
    pub(super) fn file_number(&self) -> u32 {
        self.number
    }

    #[inline]
    pub(super) fn offset_of(&self, row: u64, row_bytes: usize) -> u64 {
        self.data_offset + (row - self.rows.start) * row_bytes as u64
    }

    /// The first byte of the row that a byte is in; of what is in front of all rows, the first's.
    pub(super) fn row_start(&self, offset: u64, row_bytes: usize) -> u64 {
        let row_bytes = row_bytes as u64;
        self.data_offset + offset.saturating_sub(self.data_offset) / row_bytes * row_bytes
    }

    /// The byte behind the row that a byte is in.
    pub(super) fn row_end(&self, offset: u64, row_bytes: usize) -> u64 {
        let row_bytes = row_bytes as u64;
        self.data_offset + ((offset - self.data_offset) / row_bytes + 1) * row_bytes
    }

    /// The error of a row whose bytes begin at `offset`.
    pub(super) fn loss(&self, offset: u64, row_bytes: usize, loss: RowLoss) -> Error {
        let row = self.rows.start + (offset - self.data_offset) / row_bytes as u64;
        Error::Row { operation: "take", path: self.source.path.clone(), row, loss }
    }
}

impl RowsFile {
    fn new(file: ShardFile, direct: bool) -> Result<Self> {
        let mut provided = None;
        let (path, identity, born_ns, size_bytes, fixed) = match file {
            ShardFile::Path { path, identity, born_ns, size_bytes } => {
                (Some(path), identity, born_ns, size_bytes, None)
            }
            ShardFile::Store(store) if store.is_provided() => {
                let size_bytes = store.size_bytes();
                provided = Some(store);
                (None, (0, 0), 0, size_bytes, None)
            }
            ShardFile::Store(store) => {
                let path = store.path().map(std::path::Path::to_path_buf);
                let file = store.file().ok_or_else(|| {
                    let text =
                        "rows: the store consists of several files; pass these files as a list";
                    Error::Argument(text.into())
                })?;
                let file = if direct { direct_file(&store, &file)? } else { file };
                let born_ns = path.as_deref().map_or(0, birth_ns);
                (path, (0, 0), born_ns, store.size_bytes(), Some(file))
            }
        };
        Ok(Self {
            path,
            identity,
            born_ns,
            size_bytes,
            fixed,
            provided,
            open: ForkLock::default(),
            direct,
            align: AtomicU32::new(0),
            used: AtomicBool::new(false),
            kind: ForkLock::default(),
            map: ForkLock::default(),
            last_change: LastChange::default(),
            reads: AtomicUsize::new(0),
        })
    }

    fn learn(&self, fd: &Arc<OwnedFd>) -> Kind {
        let known = *lock(&self.kind);
        known.unwrap_or_else(|| {
            let found = Kind {
                memory_backed: sys_file::is_memory_backed(fd.as_fd()).unwrap_or(false),
                told: cachestat::tells_residency(fd.as_fd()).unwrap_or(false),
                advised: sys_file::reads_when_advised(fd.as_fd()).unwrap_or(false),
            };
            *lock(&self.kind) = Some(found);
            found
        })
    }

    /// Fails for a file that is not the one that was looked at first. One that has lost
    /// some of its rows still has the others.
    fn check(&self, (facts, born_ns): (Facts, u64)) -> Result<Facts, RowLoss> {
        // The number of a file that was removed is given to the next one.
        if facts.identity == self.identity && born_ns == self.born_ns {
            Ok(facts)
        } else {
            Err(RowLoss::Replaced)
        }
    }

    fn open(&self) -> Result<Arc<OwnedFd>, RowLoss> {
        let path = self.path.as_deref().ok_or(RowLoss::Io(Errno::BADF))?;
        let flags = OpenFlags { direct: self.direct, ..OpenFlags::default() };
        let fd = sys_file::open(path, flags).map_err(RowLoss::Io)?;
        self.check(sys_file::born_facts(fd.as_fd()).map_err(RowLoss::Io)?)?;
        Ok(Arc::new(fd))
    }

    /// What the file is now that a map shows. Without a descriptor the path is asked; there
    /// may be another file by now, of which nothing is said.
    fn facts_now(&self) -> Option<Facts> {
        let file = self.fixed.clone().or_else(|| lock(&self.open).clone());
        if let Some(file) = file {
            return sys_file::facts(file.as_fd()).ok();
        }
        self.check(sys_file::path_facts(self.path.as_deref()?).ok()?).ok()
    }
}

/// The file of a store past the page cache.
fn direct_file(store: &Store, file: &OwnedFd) -> Result<Arc<OwnedFd>> {
    let fail = |errno| match errno {
        Errno::INVAL => not_direct(),
        errno => Error::system("rows", errno),
    };
    if let Some(direct) = store.direct_file() {
        return Ok(direct);
    }
    sys_file::reopen(file.as_fd(), false, true).map(Arc::new).map_err(fail)
}

fn not_direct() -> Error {
    let reason = "the file system does not support O_DIRECT; open the rows without direct=True";
    Error::Unsupported { operation: "rows", reason: reason.into() }
}

/// Fails where a file cannot be opened to be read past the page cache.
pub(super) fn check_direct(path: &Path) -> Result<()> {
    match sys_file::open(path, OpenFlags { direct: true, ..OpenFlags::default() }) {
        Err(Errno::INVAL) => Err(not_direct()),
        Ok(fd) if sys_file::direct_alignment(fd.as_fd()).is_none() => Err(not_direct()),
        // Any other error is the take's, which names the row.
        _ => Ok(()),
    }
}

/// All shards, the files that they are in, and which of these are open.
#[derive(Debug)]
pub(super) struct Files {
    shards: Vec<Shard>,
    /// Some are in stores that have no file.
    provided: bool,
    /// The files that they are in.
    sources: Vec<Arc<RowsFile>>,
    /// Rows of each shard but the last, if that is the same for all.
    even_rows: Option<u64>,
    /// Files with an open descriptor, the longest open first.
    open: ForkLock<VecDeque<u32>>,
    open_limit: usize,
    open_count: AtomicU64,
    /// What the maps have mapped.
    mapped: Arc<SourceMaps>,
}

impl Files {
    fn new(shards: Vec<Shard>, sources: Vec<Arc<RowsFile>>) -> Self {
        let rows_of = |shard: &Shard| shard.rows.end - shard.rows.start;
        let even_rows = shards.first().map(rows_of).filter(|&rows| {
            let (_, front) = shards.split_last().expect("there is a first");
            rows > 0
                && front.iter().all(|shard| rows_of(shard) == rows)
                && shards.last().is_some_and(|last| rows_of(last) <= rows)
        });
        let open_limit = (sys_file::descriptor_limit() / 4).clamp(1, MAX_OPEN);
        Self {
            provided: sources.iter().any(|source| source.provided.is_some()),
            shards,
            sources,
            even_rows,
            open: ForkLock::default(),
            open_limit: open_limit as usize,
            open_count: AtomicU64::new(0),
            mapped: Arc::default(),
        }
    }

    /// Whether rows of some shard have to be provided.
    pub(super) fn are_provided(&self) -> bool {
        self.provided
    }

    /// How many files there are.
    pub(super) fn len(&self) -> usize {
        self.sources.len()
    }

    pub(super) fn row_count(&self) -> u64 {
        self.shards.last().map_or(0, |shard| shard.rows.end)
    }

    /// The size of each file; what has none cannot be mapped.
    pub(super) fn sizes(&self) -> impl Iterator<Item = u64> + '_ {
        let filed = self.sources.iter().filter(|source| source.provided.is_none());
        filed.map(|source| source.size_bytes)
    }

    /// Descriptors that are kept open at most.
    pub(super) fn open_limit(&self) -> usize {
        self.open_limit
    }

    pub(super) fn shard(&self, number: u32) -> &Shard {
        &self.shards[number as usize]
    }

    /// The shard that a row is in, which exists.
    pub(super) fn shard_of(&self, row: u64) -> u32 {
        let number = match self.even_rows {
            Some(rows) => (row / rows) as usize,
            None => self.shards.partition_point(|shard| shard.rows.end <= row),
        };
        number as u32
    }

    pub(super) fn open_count(&self) -> u64 {
        self.open_count.load(Ordering::Relaxed)
    }

    /// The descriptor of a shard, opened if it is not; another one may be closed for it.
    /// Whoever has it keeps it open.
    pub(super) fn file(&self, number: u32) -> Result<Opened, RowLoss> {
        let number = self.shard(number).number;
        let file = self.descriptor(number)?;
        let source = &self.sources[number as usize];
        let align = match source.align.load(Ordering::Relaxed) {
            _ if !source.direct => 1,
            0 => {
                let told = sys_file::direct_alignment(file.as_fd());
                let align = told.filter(|align| align.is_power_of_two() && *align <= MAX_ALIGN);
                let align = align.ok_or(RowLoss::Io(Errno::INVAL))?;
                source.align.store(align, Ordering::Relaxed);
                align
            }
            known => known,
        };
        Ok(Opened { file, align })
    }

    /// The same of a file.
    fn descriptor(&self, number: u32) -> Result<Arc<OwnedFd>, RowLoss> {
        let source = &self.sources[number as usize];
        if let Some(fixed) = &source.fixed {
            return Ok(Arc::clone(fixed));
        }
        source.used.store(true, Ordering::Relaxed);
        if let Some(file) = lock(&source.open).as_ref() {
            return Ok(Arc::clone(file));
        }
        self.make_room(self.open_limit);
        let file = loop {
            match source.open() {
                // The process is short of descriptors: with fewer of ours.
                Err(RowLoss::Io(Errno::MFILE | Errno::NFILE)) if self.open_count() > 0 => {
                    self.make_room(self.open_count() as usize / 2);
                }
                opened => break opened?,
            }
        };
        let mut slot = lock(&source.open);
        if let Some(other) = slot.as_ref() {
            return Ok(Arc::clone(other));
        }
        *slot = Some(Arc::clone(&file));
        drop(slot);
        let mut open = lock(&self.open);
        open.push_back(number);
        self.note_open(&open);
        Ok(file)
    }

    /// Counts the open shards again: in a child of fork the count may be its parent's.
    fn note_open(&self, open: &VecDeque<u32>) {
        self.open_count.store(open.len() as u64, Ordering::Relaxed);
    }

    /// Closes descriptors until there are fewer than `limit`.
    fn make_room(&self, limit: usize) {
        let mut open = lock(&self.open);
        self.note_open(&open);
        // Twice round: those in use are passed over once.
        for _ in 0..2 * open.len() {
            if open.len() < limit.max(1) {
                return;
            }
            let Some(number) = open.pop_front() else { return };
            let source = &self.sources[number as usize];
            if source.used.swap(false, Ordering::Relaxed) {
                open.push_back(number);
                continue;
            }
            *lock(&source.open) = None;
            self.note_open(&open);
        }
    }

    /// Whether reading the shard never waits for a device; known once it was open.
    pub(super) fn is_memory_backed(&self, number: u32, file: &Arc<OwnedFd>) -> bool {
        self.shard(number).source.learn(file).memory_backed
    }

    /// Whether the kernel reads of the shard ahead what it is asked to; known once it was open.
    pub(super) fn reads_when_advised(&self, number: u32, file: &Arc<OwnedFd>) -> bool {
        self.shard(number).source.learn(file).advised
    }

    /// Notes rows that are read by system calls.
    pub(super) fn note_reads(&self, number: u32, rows: usize) {
        self.shard(number).source.reads.fetch_add(rows, Ordering::Relaxed);
    }

    /// The map of a file, made once rows were read from it often enough; none where
    /// it cannot be known what of the file is in the page cache.
    pub(super) fn map(&self, number: u32) -> Option<Arc<SourceMap>> {
        let source = &self.sources[number as usize];
        if let Some(map) = lock(&source.map).as_ref() {
            return Some(Arc::clone(map));
        }
        let due = source.reads.load(Ordering::Relaxed) >= POPULATE_READS;
        if !due || source.provided.is_some() {
            return None;
        }
        let file = self.descriptor(number).ok()?;
        if !source.learn(&file).told {
            return None;
        }
        let made = Arc::new(SourceMap::new(file.as_fd(), source.size_bytes, &self.mapped).ok()?);
        let mut slot = lock(&source.map);
        Some(Arc::clone(slot.get_or_insert(made)))
    }

    pub(super) fn map_if_made(&self, number: usize) -> Option<Arc<SourceMap>> {
        lock(&self.sources[number].map).clone()
    }

    /// To be asked before rows of a file are copied from its map; none if they may not be.
    pub(super) fn before_copies(&self, number: u32) -> Option<Unchanged> {
        let source = &self.sources[number as usize];
        source.last_change.before(source.size_bytes, || source.facts_now())
    }

    /// Whether rows of a file that were copied since are good.
    pub(super) fn after_copies(&self, number: u32, since: Unchanged) -> bool {
        let source = &self.sources[number as usize];
        source.last_change.after(since, source.size_bytes, source.facts_now())
    }

    pub(super) fn mapped(&self) -> &SourceMaps {
        &self.mapped
    }

    /// Closes and unmaps everything that nobody uses any more.
    pub(super) fn forget(&self) {
        let mut open = lock(&self.open);
        for number in open.drain(..) {
            *lock(&self.sources[number as usize].open) = None;
        }
        self.note_open(&open);
        drop(open);
        for source in &self.sources {
            *lock(&source.map) = None;
        }
    }
}
