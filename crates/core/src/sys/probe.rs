//! What this kernel lets this process do, found out by trying.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io::Errno;

use super::call::{enter, Call};
use super::mm::{has_populate_read, system_page_bytes, Access, Advice, OwnProcess, Region};
use super::uffd::{Delivery, FaultScope, Features, Stores, Uffd};
use super::{copy, file, pagemap};

pub use super::pagemap::max_map_count;

/// How often it is tried whether page tables are given back.
const RECLAIM_TRIES: u32 = 3;

/// One thing that the kernel may have.
#[derive(Clone, Debug)]
pub struct Probe {
    /// How it is called.
    pub name: &'static str,
    /// Whether it works here.
    pub available: bool,
    /// What was found.
    pub detail: String,
    /// How to get it; empty when it is there.
    pub remedy: &'static str,
}

/// Whether userfaultfd works, and what it has.
///
/// # Errors
/// ENOSYS without it, EPERM where it is refused.
pub fn userfaultfd() -> Result<(Features, FaultScope), Errno> {
    let uffd = Uffd::open(Stores::Fault, Delivery::Message, FaultScope::UserAndKernel)?;
    let region = Region::anonymous(system_page_bytes(), 1, Access::Write)?;
    uffd.register_missing(&region)?;
    Ok((uffd.features(), uffd.scope()))
}

/// Whether the kernel gives the page table of a block of memory back when the whole of it
/// is dropped (6.14, where `CONFIG_PT_RECLAIM` is set). Found out once.
#[must_use]
pub fn reclaims_page_tables() -> bool {
    const UNKNOWN: u8 = 2;
    /// Not a `Once`, which a child that is forked meanwhile would wait for: found out
    /// twice, it is the same.
    static FOUND: AtomicU8 = AtomicU8::new(UNKNOWN);
    let found = FOUND.load(Ordering::Relaxed);
    if found != UNKNOWN {
        return found == 1;
    }
    let reclaims = (0..RECLAIM_TRIES).any(|_| reclaims_now() == Ok(true));
    FOUND.store(reclaims.into(), Ordering::Relaxed);
    reclaims
}

/// Makes page tables, drops what they map, and looks whether they are gone. Other threads
/// make and lose some meanwhile, so there are many.
fn reclaims_now() -> Result<bool, Errno> {
    const BLOCKS: usize = 128;
    let page = system_page_bytes();
    let block = page * (page / size_of::<u64>());
    let region = Region::anonymous(BLOCKS * block, block, Access::Write)?;
    // A kernel built without huge pages says EINVAL.
    let _small = region.advise(0, region.len(), Advice::NoHugePage);
    for at in (0..region.len()).step_by(block) {
        region.span(at, 1).copy_from(&[1]);
    }
    let before = pagemap::page_table_bytes()?;
    region.advise(0, region.len(), Advice::DontNeed)?;
    let after = pagemap::page_table_bytes()?;
    Ok(before.saturating_sub(after) > (BLOCKS * page / 2) as u64)
}

/// The running kernel's release, such as "6.8.0-45-generic".
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Bytes that this process may lock; None without limit.
#[must_use]
pub fn memlock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

/// Whether a guard page can be made (6.13).
fn guard_pages() -> Result<(), Errno> {
    let region = Region::anonymous(system_page_bytes(), 1, Access::Write)?;
    region.advise(0, region.len(), Advice::GuardInstall)
}

/// Whether a ring can be had.
fn io_uring() -> Result<(), Errno> {
    enter(Call::RingSetup)?;
    match io_uring::IoUring::new(1) {
        Ok(_) => Ok(()),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

/// Whether the kernel has `cachestat` (6.5).
fn cachestat() -> Result<(), Errno> {
    let fd = file::memory_file("fremap-probe")?;
    file::cachestat(fd.as_fd(), 0, 1).map(|_| ())
}

fn probe(name: &'static str, found: Result<String, String>, remedy: &'static str) -> Probe {
    match found {
        Ok(detail) => Probe { name, available: true, detail, remedy: "" },
        Err(detail) => Probe { name, available: false, detail, remedy },
    }
}

fn describe(errno: Errno) -> String {
    std::io::Error::from(errno).to_string()
}

fn userfaultfd_probes() -> Vec<Probe> {
    let uffd = userfaultfd();
    // What a window may ask for; not all of it at once.
    let features = uffd.and_then(|_| Uffd::supported());
    let feature = |name, has: fn(Features) -> bool, what: &str, remedy| {
        let found = match features {
            Ok(features) if has(features) => Ok(what.to_owned()),
            Ok(_) => Err("this kernel does not have it".to_owned()),
            Err(errno) => Err(format!("no userfaultfd: {}", describe(errno))),
        };
        probe(name, found, remedy)
    };
    let kernel_faults = match uffd {
        Ok((_, FaultScope::UserAndKernel)) => Ok("system calls may touch absent pages".to_owned()),
        Ok((_, FaultScope::UserOnly)) => {
            Err("a system call that touches an absent page gets EFAULT".to_owned())
        }
        Err(errno) => Err(format!("no userfaultfd: {}", describe(errno))),
    };
    vec![
        probe(
            "userfaultfd",
            uffd.map(|_| "one mapping for any order of pages".to_owned()).map_err(describe),
            "Linux 5.11 or later; in a container, a seccomp profile that allows userfaultfd",
        ),
        probe(
            "userfaultfd_kernel_faults",
            kernel_faults,
            "CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1, or access to \
             /dev/userfaultfd (6.1)",
        ),
        feature(
            "uffd_move",
            Features::swap,
            "pages are swapped in without a copy",
            "Linux 6.8; without it pages are copied in, at twice the price",
        ),
        feature(
            "uffd_poison",
            Features::poison,
            "pages without access cost no mapping",
            "Linux 6.6; without it each run of pages without access is a mapping",
        ),
        feature(
            "uffd_wp",
            Features::write_protect,
            "pages can be write-protected one by one",
            "Linux 5.7 on x86-64, 6.10 on aarch64",
        ),
        feature(
            "uffd_wp_async",
            Features::async_writes,
            "the kernel notes which pages were stored to",
            "Linux 6.7; without it the first store to a page is a fault",
        ),
    ]
}

/// Everything that fremap looks for.
#[must_use]
pub fn capabilities() -> Vec<Probe> {
    let mut probes = userfaultfd_probes();
    let yes = |text: &str| text.to_owned();
    probes.extend([
        probe(
            "populate_read",
            has_populate_read()
                .then(|| yes("the pages of a mapping are filled in one call"))
                .ok_or_else(|| yes("this kernel does not have it")),
            "Linux 5.14; without it there are no windows, and rows and stores work",
        ),
        probe(
            "guard_pages",
            guard_pages()
                .map(|()| yes("holes in engine \"eager\" cost no mapping"))
                .map_err(describe),
            "Linux 6.13; without them each hole in engine \"eager\" is a mapping",
        ),
        probe(
            "process_madvise",
            OwnProcess::open()
                .map(|_| yes("many ranges are dropped in one call"))
                .ok_or_else(|| yes("the kernel refuses it")),
            "Linux 6.13, or CAP_SYS_PTRACE under a seccomp profile that refuses it",
        ),
        probe(
            "io_uring",
            io_uring().map(|()| yes("scattered reads in flight together")).map_err(describe),
            "Linux 5.11 with sysctl kernel.io_uring_disabled=0; in a container, a seccomp profile \
             that allows io_uring; without it a pool of threads reads",
        ),
        probe(
            "cachestat",
            cachestat()
                .map(|()| yes("the kernel says when it may not tell what is resident"))
                .map_err(describe),
            "Linux 6.5; without it the file's owner and mode decide",
        ),
        probe(
            "page_table_reclaim",
            reclaims_page_tables()
                .then(|| yes("page tables are given back of blocks that empty"))
                .ok_or_else(|| yes("page tables stay as long as the window")),
            "Linux 6.14 with CONFIG_PT_RECLAIM; without it they take from the budget",
        ),
        probe(
            "sigbus_recovery",
            copy::recovery_available()
                .map(|()| yes("warm pages are copied from a mapping of the file")),
            "x86-64; elsewhere warm pages are read by system calls, at about twice the price",
        ),
    ]);
    probes
}
