//! The object in `/dev/shm` that has the slots: its name, its creation, and its end.
//!
//! An object is created without a name, with its header and its lock, and is then given a name.
//! So a process that opens it by name finds the lock. Its memory is allocated once, under that
//! lock, by the first process that needs it. The last process to leave removes the name, also
//! under the lock, so that no process removes the name of a later object.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;

use super::layout::{
    header, Counter, Geometry, Layout, Stage, HEADER_BYTES, MAGIC, MOST_OWNERS, VERSION, WORD,
};
use super::table::{Table, Words};
use super::words::{Content, OwnerIndex};
use crate::error::{Error, Interrupt, Result, Uninterruptible};
use crate::memory;
use crate::sys::owner::{namespaces, Owner};
use crate::sys::shm::{self, Mapping, RobustGuard, RobustLock};
use crate::sys::span::system_page_bytes;
use crate::sys::{file as sys_file, futex};

/// Where objects have their names.
const DIRECTORY: &str = "/dev/shm";
/// How long a wait may keep the caller's interrupt waiting.
pub(super) const WAIT: Duration = Duration::from_millis(25);
/// The longest name.
const MOST_NAME_BYTES: usize = 128;
/// Bytes that are allocated between two questions whether the caller interrupts.
const PIECE_BYTES: u64 = 64 << 20;
/// Objects that may lose their name while one is looked for.
const MOST_ATTEMPTS: usize = 100;

impl Words for Mapping {
    fn get(&self, at: usize) -> u64 {
        self.words().get(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set(&self, at: usize, value: u64) {
        // In this order for whoever looks after this process has died.
        if let Some(word) = self.words().get(at) {
            word.store(value, Ordering::Release);
        }
    }
}

/// The process that an owner's word means.
pub(super) fn process_of(word: u64) -> Owner {
    Owner { process: (word >> 32) as u32, began: word as u32 }
}

/// The word of a process.
pub(super) fn word_of(owner: Owner) -> u64 {
    u64::from(owner.process) << 32 | u64::from(owner.began)
}

/// Objects of each user have names of their own.
fn prefix() -> String {
    format!("fremap-slots-{}-", rustix::process::geteuid().as_raw())
}

/// The path of an object.
pub(super) fn path_of(operation: &'static str, name: &str) -> Result<PathBuf> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > MOST_NAME_BYTES || !name.bytes().all(plain) {
        return Err(Error::Argument(format!(
            "{operation}: the name is {name:?}; it must be 1 to {MOST_NAME_BYTES} of the letters \
             a-z, A-Z, digits, '.', '_' and '-'"
        )));
    }
    Ok(Path::new(DIRECTORY).join(prefix() + name))
}

/// An object that this process has mapped.
#[derive(Debug)]
pub struct Object {
    pub(super) mapping: Mapping,
    pub(super) layout: Layout,
    pub(super) geometry: Geometry,
    path: PathBuf,
    identity: (u64, u64),
}

/// The table of an object, while this thread has the lock.
pub(super) struct Locked<'o> {
    pub(super) table: Table<'o, Mapping>,
    guard: RobustGuard<'o>,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.table.repair();
        }
    }
}

/// What a process wants of an object.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'n> {
    /// The name, without that of the user.
    pub name: &'n str,
    /// What the slots show.
    pub geometry: Geometry,
    /// When the store's files were changed last: extents that were read before are read again.
    /// None if all changes are made through the slots, while there is a process that uses them.
    pub changed: Option<u64>,
    /// Bytes that a new object may take.
    pub most_bytes: Option<u64>,
}

fn failed(path: &Path, errno: Errno) -> Error {
    let hint = match errno {
        Errno::LOOP => "; it is a symbolic link, which fremap does not follow there",
        _ => "",
    };
    Error::system_with_hint("Slots", errno, hint).of_file(Some(path))
}

fn refused(path: &Path, why: &str) -> Error {
    Error::Argument(format!("Slots: {} {why}", path.display()))
}

/// Makes an object that has a name, a header and a lock.
pub(super) fn create(path: &Path, wanted: &Wanted<'_>, layout: &Layout) -> Result<(), Error> {
    let fail = |errno| failed(path, errno);
    let fd = sys_file::temporary_file(Path::new(DIRECTORY)).map_err(fail)?;
    sys_file::truncate(fd.as_fd(), layout.object_bytes as u64).map_err(fail)?;
    // Else a full file system would be a signal.
    shm::allocate(fd.as_fd(), 0, HEADER_BYTES as u64)
        .map_err(|errno| no_space(path, HEADER_BYTES as u64, errno))?;
    let head = Mapping::new(fd, HEADER_BYTES).map_err(fail)?;
    head.lock(header::LOCK * WORD).begin().map_err(fail)?;
    head.set(header::MAGIC, MAGIC);
    head.set(header::VERSION, VERSION);
    head.set(header::LOCK_LAYOUT, RobustLock::LAYOUT);
    for (at, word) in own_namespaces()?.into_iter().enumerate() {
        head.set(header::NAMESPACES + at, word);
    }
    for (at, word) in wanted.geometry.words().into_iter().enumerate() {
        head.set(header::GEOMETRY + at, word);
    }
    head.set(header::CHANGED, wanted.changed.unwrap_or(0));
    head.set(header::STAGE, Stage::Begun as u64);
    match shm::name_object(head.fd(), path) {
        // Somebody else was first.
        Err(Errno::EXIST) => Ok(()),
        outcome => outcome.map_err(fail),
    }
}

fn no_space(path: &Path, wanted: u64, errno: Errno) -> Error {
    if errno != Errno::NOSPC {
        return failed(path, errno);
    }
    let directory = Path::new(DIRECTORY);
    let free = sys_file::free_bytes(directory).unwrap_or(0);
    Error::SharedMemory { operation: "Slots", path: directory.into(), wanted, free }
}

impl Object {
    /// Opens an object and looks at its header; None if the name is gone.
    fn open(path: &Path) -> Result<Option<Self>> {
        let fail = |errno| failed(path, errno);
        let fd = match sys_file::open_shared(path, false) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened.map_err(fail)?,
        };
        let facts = sys_file::facts(fd.as_fd()).map_err(fail)?;
        let others = facts.mode.intersects(Mode::RWXG | Mode::RWXO);
        if facts.owner != rustix::process::geteuid().as_raw() || others {
            return Err(refused(
                path,
                "belongs to another user, or may be opened by others; remove it, or use another name",
            ));
        }
        let size = usize::try_from(facts.size_bytes).unwrap_or(0);
        if !facts.file_type.is_file() || size < HEADER_BYTES {
            return Err(refused(path, "holds no slots; remove it, or use another name"));
        }
        let mapping = Mapping::new(fd, size).map_err(fail)?;
        let geometry = checked_header(path, &mapping)?;
        let layout = Layout::new(&geometry, system_page_bytes())?;
        if layout.object_bytes != size {
            return Err(refused(path, "was truncated or made longer; remove it"));
        }
        Ok(Some(Self { mapping, layout, geometry, path: path.into(), identity: facts.identity }))
    }

    /// Opens the object of a name, or makes it; it has its memory afterwards, and this process
    /// is an owner.
    pub(super) fn attach(
        wanted: &Wanted<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<(Self, OwnerIndex)> {
        let path = path_of("Slots", wanted.name)?;
        let layout = Layout::new(&wanted.geometry, system_page_bytes())?;
        for _ in 0..MOST_ATTEMPTS {
            interrupt.check()?;
            let Some(object) = Self::open(&path)? else {
                create(&path, wanted, &layout)?;
                continue;
            };
            if let Some(owner) = object.join(wanted, interrupt)? {
                return Ok((object, owner));
            }
        }
        Err(refused(&path, "is created and removed again and again; use another name"))
    }

    /// Makes this process an owner; None if the object has lost its name.
    fn join(&self, wanted: &Wanted<'_>, interrupt: &dyn Interrupt) -> Result<Option<OwnerIndex>> {
        let dead = self.dead()?;
        let locked = self.lock(interrupt)?;
        let stage = self.stage();
        if stage == Stage::Unnamed {
            // Whoever said so may have died before he took the name away.
            self.unlink(&locked);
            return Ok(None);
        }
        self.dismiss(&locked, &dead);
        let in_use = !self.owners().is_empty();
        if self.geometry != wanted.geometry {
            if !in_use {
                self.unname(&locked);
                return Ok(None);
            }
            return Err(self.differs(&wanted.geometry));
        }
        if !self.has_memory() {
            if let Err(error) = self.fill(&locked, wanted, interrupt) {
                self.unname(&locked);
                return Err(error);
            }
        }
        self.mapping.populate(self.layout.table_bytes());
        let known = self.mapping.get(header::CHANGED);
        let changed = wanted.changed.unwrap_or(known);
        // While no process has used them, anybody may have changed a store that is written; when
        // that was last says nothing, as it was also changed through the slots.
        if changed != known || (wanted.changed.is_none() && !in_use) {
            self.forget(&locked);
            self.mapping.set(header::CHANGED, changed);
        }
        let admitted = self.admit(&locked);
        if admitted.is_err() && !in_use {
            self.unname(&locked);
        }
        admitted.map(Some)
    }

    /// Gives an object its memory.
    fn fill(
        &self,
        locked: &Locked<'_>,
        wanted: &Wanted<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let bytes = self.layout.first_bytes() as u64;
        if let Some(budget) = wanted.most_bytes.filter(|&most| bytes > most) {
            let why = "the slots are memory that all processes share (use fewer slots)";
            return Err(Error::Budget { operation: "Slots", wanted: bytes, budget, why });
        }
        // Before the first of them is allocated, as what is short then is short for everybody.
        let available = memory::available().unwrap_or(u64::MAX);
        if bytes > available {
            return Err(Error::Memory {
                operation: "Slots",
                wanted: bytes,
                available,
                completed: 0,
            });
        }
        let free = sys_file::free_bytes(Path::new(DIRECTORY));
        if free.is_ok_and(|free| bytes > free) {
            return Err(no_space(&self.path, bytes, Errno::NOSPC));
        }
        let mut done = 0;
        while done < bytes {
            let part = PIECE_BYTES.min(bytes - done);
            shm::allocate(self.mapping.fd(), done, part)
                .map_err(|errno| no_space(&self.path, bytes, errno))?;
            done += part;
            interrupt.check()?;
        }
        locked.table.repair();
        self.mapping.set(header::HAS_MEMORY, 1);
        self.mapping.set(header::STAGE, Stage::Whole as u64);
        Ok(())
    }

    /// Evicts every extent, so that the next call that names it reads it again.
    fn forget(&self, locked: &Locked<'_>) {
        for slot in 0..self.layout.slot_count as u32 {
            let content = locked.table.content(crate::slot_table::Slot(slot));
            if let Some(key) = content.key() {
                locked.table.evict(key);
            }
        }
    }

    fn differs(&self, wanted: &Geometry) -> Error {
        let Geometry { page_bytes, extent_pages, slot_count, store_bytes, .. } = self.geometry;
        let what = if self.geometry.words()[..4] == wanted.words()[..4] {
            "slots of another store, or of another version of it".into()
        } else {
            format!(
                "{slot_count} slots of {extent_pages} pages of {page_bytes} bytes, of a store of \
                 {store_bytes} bytes; these would be {} of {} of {}, of {}",
                wanted.slot_count, wanted.extent_pages, wanted.page_bytes, wanted.store_bytes
            )
        };
        let path = self.path.display();
        Error::Argument(format!(
            "Slots: {path}, which {} other process(es) use, has {what}; use another name, or the \
             same slots",
            self.owners().len()
        ))
    }

    fn stage(&self) -> Stage {
        Stage::of(self.mapping.get(header::STAGE)).unwrap_or(Stage::Unnamed)
    }

    /// Whether the memory behind the header is allocated; a touch of it may fail before.
    fn has_memory(&self) -> bool {
        self.mapping.get(header::HAS_MEMORY) != 0
    }

    /// Says that the object is about to lose its name, and takes it away.
    fn unname(&self, locked: &Locked<'_>) {
        self.mapping.set(header::STAGE, Stage::Unnamed as u64);
        self.unlink(locked);
    }

    /// Removes the name, if it is still this object's.
    fn unlink(&self, _locked: &Locked<'_>) {
        if sys_file::named_facts(&self.path).is_ok_and(|facts| facts.identity == self.identity) {
            // Its owner may; else somebody has removed it meanwhile.
            let _unlinked = sys_file::unlink(&self.path);
        }
    }

    // The lock.

    /// Takes the lock; what its last holder left half changed is repaired.
    pub(super) fn lock(&self, interrupt: &dyn Interrupt) -> Result<Locked<'_>> {
        loop {
            match self.lock_within(WAIT) {
                Ok(locked) => return Ok(locked),
                Err(Errno::TIMEDOUT) => interrupt.check()?,
                Err(errno) => return Err(failed(&self.path, errno)),
            }
        }
    }

    /// The same if nobody has it.
    pub(super) fn try_lock(&self) -> Option<Locked<'_>> {
        self.lock_within(Duration::ZERO).ok()
    }

    fn lock_within(&self, timeout: Duration) -> Result<Locked<'_>, Errno> {
        let guard = self.mapping.lock(header::LOCK * WORD).acquire(timeout)?;
        let mut locked = Locked { table: Table::new(&self.mapping, &self.layout), guard };
        if locked.guard.is_broken() {
            if self.has_memory() {
                locked.table.repair();
                locked.table.count(Counter::Repairs, 1);
            }
            locked.guard.mend();
        }
        Ok(locked)
    }

    /// The same, however long it takes: for what must be done.
    pub(super) fn lock_anyway(&self) -> Option<Locked<'_>> {
        self.lock(&Uninterruptible).ok()
    }

    // Owners.

    /// The owners as they are now, without the lock.
    fn owners(&self) -> Vec<(OwnerIndex, u64)> {
        if !self.has_memory() {
            return Vec::new();
        }
        Table::new(&self.mapping, &self.layout).owners().collect()
    }

    /// Those whose process is dead.
    ///
    /// # Errors
    /// [`Error::Unsupported`] in a child that is in another namespace, where all of them would
    /// seem dead.
    pub(super) fn dead(&self) -> Result<Vec<(OwnerIndex, u64)>> {
        check_namespaces(&self.path, &self.mapping)?;
        let owners = self.owners().into_iter();
        Ok(owners.filter(|&(_, word)| !process_of(word).lives()).collect())
    }

    /// Takes back what owners had that are dead; says whether there was one.
    pub(super) fn dismiss(&self, locked: &Locked<'_>, dead: &[(OwnerIndex, u64)]) -> bool {
        let mut any = false;
        for &(owner, word) in dead {
            // Another process may have its number by now.
            if locked.table.owner(owner) == word {
                if self.renew_coming(locked, owner).is_err() {
                    // Its slots stay its own, and are given to nobody; whoever waits tries again.
                    continue;
                }
                locked.table.dismiss(owner);
                locked.table.count(Counter::Deaths, 1);
                self.free_holds(owner);
                any = true;
            }
        }
        any
    }

    /// Gives the slots that a dead process was reading into other memory. The kernel does not wait
    /// for a device when it ends a process: what was in flight still arrives, in the old memory.
    fn renew_coming(&self, locked: &Locked<'_>, owner: OwnerIndex) -> Result<(), Errno> {
        let bytes = self.geometry.extent_bytes();
        for slot in 0..self.layout.slot_count as u32 {
            let content = locked.table.content(crate::slot_table::Slot(slot));
            if matches!(content, Content::Coming(_, bringer) if bringer == owner) {
                let offset = self.layout.slots_offset as u64 + u64::from(slot) * bytes;
                shm::free(self.mapping.fd(), offset, bytes)?;
                shm::allocate(self.mapping.fd(), offset, bytes)?;
            }
        }
        Ok(())
    }

    /// Makes this process an owner.
    pub(super) fn admit(&self, locked: &Locked<'_>) -> Result<OwnerIndex> {
        // A child of fork may be in another one than its parent.
        check_namespaces(&self.path, &self.mapping)?;
        let this = Owner::this().map_err(|errno| failed(Path::new("/proc/self/stat"), errno))?;
        let owner = locked.table.vacancy().ok_or_else(|| {
            refused(
                &self.path,
                &format!("is used by {MOST_OWNERS} processes, the most that it can have"),
            )
        })?;
        let (offset, bytes) = self.layout.holds_of(owner.0);
        shm::allocate(self.mapping.fd(), offset, bytes)
            .map_err(|errno| no_space(&self.path, bytes, errno))?;
        locked.table.admit(owner, word_of(this));
        Ok(owner)
    }

    /// Gives back the memory of an owner's holds, which are zeros.
    fn free_holds(&self, owner: OwnerIndex) {
        let (offset, bytes) = self.layout.holds_of(owner.0);
        // It is used by the next owner else.
        let _freed = shm::free(self.mapping.fd(), offset, bytes);
    }

    /// Ends an owner; the last takes the name along.
    pub(super) fn leave(&self, locked: &Locked<'_>, owner: OwnerIndex, dead: &[(OwnerIndex, u64)]) {
        locked.table.dismiss(owner);
        self.free_holds(owner);
        self.dismiss(locked, dead);
        if locked.table.owners().next().is_none() && self.stage() != Stage::Unnamed {
            self.unname(locked);
        }
    }

    // Waiting.

    fn notices(&self) -> &AtomicU32 {
        self.mapping.half_word(header::NOTICES)
    }

    fn sleepers(&self) -> &AtomicU32 {
        self.mapping.half_word(header::SLEEPERS)
    }

    /// What to [`sleep`](Self::sleep) on, for a process that finds under the lock that it must wait.
    pub(super) fn must_wait(&self, _locked: &Locked<'_>) -> u32 {
        self.sleepers().store(1, Ordering::SeqCst);
        self.notices().load(Ordering::SeqCst)
    }

    /// Sleeps until a notification, or for a while; returns which.
    pub(super) fn sleep(&self, notice: u32) -> bool {
        futex::wait_shared(self.notices(), notice, WAIT)
    }

    /// Wakes all sleeping threads, after a change that they may be waiting for.
    pub(super) fn notify(&self) {
        self.notices().fetch_add(1, Ordering::SeqCst);
        if self.sleepers().swap(0, Ordering::SeqCst) != 0 {
            futex::wake_all_shared(self.notices());
        }
    }
}

/// The geometry in a header, if this process can use the object.
fn checked_header(path: &Path, mapping: &Mapping) -> Result<Geometry> {
    if mapping.get(header::MAGIC) != MAGIC {
        return Err(refused(path, "holds no slots; remove it, or use another name"));
    }
    if mapping.get(header::VERSION) != VERSION
        || mapping.get(header::LOCK_LAYOUT) != RobustLock::LAYOUT
    {
        return Err(refused(
            path,
            "was made by another version of fremap, or with another C library; use one version, \
             or another name",
        ));
    }
    check_namespaces(path, mapping)?;
    Ok(Geometry::of(std::array::from_fn(|at| mapping.get(header::GEOMETRY + at))))
}

/// The namespaces of this process, if `/proc` tells of the processes in them.
fn own_namespaces() -> Result<[u64; 2]> {
    namespaces().map_err(|errno| match errno {
        Errno::XDEV => Error::Unsupported {
            operation: "Slots",
            reason: "/proc shows the processes of another PID namespace, so fremap cannot see \
                     which processes are alive; mount the /proc of this namespace (unshare \
                     --mount-proc)"
                .into(),
        },
        _ => failed(Path::new("/proc/self/ns"), errno),
    })
}

/// Refuses where this process does not see the processes that the object's owners are.
fn check_namespaces(path: &Path, mapping: &Mapping) -> Result<()> {
    let own = own_namespaces()?;
    if own != [0, 1].map(|at| mapping.get(header::NAMESPACES + at)) {
        return Err(Error::Unsupported {
            operation: "Slots",
            reason: format!(
                "{} was made in another PID or time namespace, whose processes fremap cannot \
                 see; share the namespace (docker run --pid=), use another name, or remove the \
                 file if that namespace is gone",
                path.display()
            ),
        });
    }
    Ok(())
}

/// An object that has a name.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The name, without that of the user.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Slots there are.
    pub slot_count: u64,
    /// Bytes of each.
    pub extent_bytes: u64,
    /// Slots whose extent is there.
    pub filled: u64,
    /// The processes that use it.
    pub processes: Vec<u32>,
}

/// The objects of this user, by name. What holds no slots is passed over.
///
/// # Errors
/// [`Error::Io`].
pub fn list() -> Result<Vec<Listed>> {
    let prefix = prefix();
    let fail = |error: &std::io::Error| {
        failed(Path::new(DIRECTORY), Errno::from_io_error(error).unwrap_or(Errno::IO))
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(DIRECTORY).map_err(|error| fail(&error))? {
        let path = entry.map_err(|error| fail(&error))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.and_then(|name| name.strip_prefix(&prefix)) else { continue };
        if let Ok(Some(object)) = Object::open(&path) {
            found.push(object.listed(name));
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

impl Object {
    fn listed(&self, name: &str) -> Listed {
        let living = self.owners().into_iter().map(|(_, word)| process_of(word));
        let mut processes: Vec<u32> =
            living.filter(|owner| owner.lives()).map(|owner| owner.process).collect();
        processes.sort_unstable();
        processes.dedup();
        let filled = if self.has_memory() { self.mapping.get(header::FILLED_COUNT) } else { 0 };
        Listed {
            name: name.into(),
            path: self.path.clone(),
            bytes: self.layout.first_bytes() as u64,
            slot_count: self.geometry.slot_count,
            extent_bytes: self.geometry.extent_bytes(),
            filled,
            processes,
        }
    }
}

/// Takes the name of an object away, and with it, once nobody maps it, its memory. One that
/// processes use is refused, unless `forced`: they go on with it, and others make a new one.
///
/// # Errors
/// [`Error::Io`]: ENOENT; [`Error::Argument`] for what is no name, or is used;
/// [`Error::Interrupted`].
pub fn remove(name: &str, forced: bool, interrupt: &dyn Interrupt) -> Result<()> {
    let path = path_of("remove", name)?;
    let Some(object) = Object::open(&path)? else { return Err(failed(&path, Errno::NOENT)) };
    let dead = object.dead()?;
    let locked = object.lock(interrupt)?;
    object.dismiss(&locked, &dead);
    let used = object.owners().len();
    if used > 0 && !forced {
        return Err(refused(&path, &format!("is used by {used} process(es); end them first")));
    }
    object.unname(&locked);
    Ok(())
}
