//! What this kernel allows this process to do, found out by trying.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io::Errno;

use crate::error::{self, describe, Error};

use super::call::{enter, errno_of, Call};
use super::mm::{has_populate_read, system_page_bytes, Access, Advice, OwnProcess, Region};
use super::uffd::{Delivery, FaultScope, Features, Stores, Uffd};
use super::{cachestat, copy, file, pagemap};

pub use super::pagemap::max_map_count;

/// How often it is tried whether page tables are given back.
const RECLAIM_TRIES: u32 = 3;

/// A thing that a kernel may have: from which on, what fremap does with it, and what its
/// lack costs. `docs/kernels.md` is the table of these.
#[derive(Debug)]
pub struct Feature {
    /// How it is called.
    pub name: &'static str,
    /// The kernels that have it, in words; empty where it is no matter of the kernel.
    pub since: &'static str,
    /// The first of them here, as (major, minor).
    kernel: (u32, u32),
    /// What uses it.
    pub used_for: &'static str,
    /// What does not work, or is slower, without it.
    pub without: &'static str,
}

const WRITE_PROTECT_KERNEL: (u32, u32) =
    if cfg!(target_arch = "aarch64") { (6, 10) } else { (5, 7) };

/// Everything that fremap looks for.
pub const FEATURES: [Feature; 13] = [
    Feature {
        name: "userfaultfd",
        since: "5.11 (4.3 with CAP_SYS_PTRACE)",
        kernel: (5, 11),
        used_for: "engine \"paged\": one kernel mapping for any order of pages",
        without:
            "windows use \"alias\" (one mapping for each piece), or \"eager\" (loaded at once, \
                  without a budget)",
    },
    Feature {
        name: "userfaultfd_kernel_faults",
        since: "4.3",
        kernel: (4, 3),
        used_for: "system calls that touch absent pages of engine \"paged\"",
        without: "such a system call fails with EFAULT; populate() the pages first",
    },
    Feature {
        name: "uffd_move",
        since: "6.8",
        kernel: (6, 8),
        used_for: "engine \"paged\" swaps pages in without a copy; tracking=\"async\"",
        without: "pages are copied, and a remap of cached pages takes up to 4 times as long",
    },
    Feature {
        name: "uffd_poison",
        since: "6.6",
        kernel: (6, 6),
        used_for: "engine \"paged\": pages without access cost no mapping",
        without: "each run of pages without access is a mapping, and touching it raises SIGSEGV",
    },
    Feature {
        name: "uffd_wp",
        since: "5.7 (6.10 on aarch64)",
        kernel: WRITE_PROTECT_KERNEL,
        used_for: "engine \"paged\" in writable windows",
        without: "writable windows use \"eager\", without a budget",
    },
    Feature {
        name: "uffd_wp_async",
        since: "6.7",
        kernel: (6, 7),
        used_for: "tracking=\"async\": the kernel notes which pages were written",
        without: "the first write to a page is a fault (tracking=\"sync\")",
    },
    Feature {
        name: "populate_read",
        since: "5.14",
        kernel: (5, 14),
        used_for: "every window: one call loads the pages of a mapping",
        without: "windows do not work; rows and stores do",
    },
    Feature {
        name: "guard_pages",
        since: "6.13",
        kernel: (6, 13),
        used_for: "engine \"eager\": pages without access cost no mapping",
        without: "each run of pages without access in engine \"eager\" is a mapping",
    },
    Feature {
        name: "process_madvise",
        since: "6.13",
        kernel: (6, 13),
        used_for: "evict drops many ranges in one call",
        without: "evict makes one call for each range",
    },
    Feature {
        name: "io_uring",
        since: "5.11",
        kernel: (5, 11),
        used_for: "scattered reads and writes, up to 128 in flight",
        without: "a pool of threads reads and writes, up to 16 requests at once",
    },
    Feature {
        name: "cachestat",
        since: "6.5",
        kernel: (6, 5),
        used_for: "asking which pages are resident, even of files that cannot be mapped",
        without: "only a file's owner, and users who may write it, can ask (mincore), and only if \
                  it can be mapped",
    },
    Feature {
        name: "page_table_reclaim",
        since: "6.14 with CONFIG_PT_RECLAIM",
        kernel: (6, 14),
        used_for: "the kernel frees the page tables of evicted memory",
        without: "page tables are kept as long as the window, and count against its budget",
    },
    Feature {
        name: "sigbus_recovery",
        since: "",
        kernel: (0, 0),
        used_for: "cached pages are copied from a mapping of the file (x86-64)",
        without: "cached pages are read by system calls, which takes about twice as long",
    },
];

/// A feature, and whether this process has it.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The feature.
    pub feature: &'static Feature,
    /// Whether it works here.
    pub available: bool,
    /// What was found.
    pub detail: String,
    /// How to get it; empty when it is there.
    pub remedy: String,
}

/// Whether userfaultfd works, and what it has.
///
/// # Errors
/// ENOSYS without it, EPERM where it is refused.
pub(crate) fn userfaultfd() -> Result<(Features, FaultScope), Errno> {
    let uffd = Uffd::open(Stores::Fault, Delivery::Message, FaultScope::UserAndKernel)?;
    let region = Region::anonymous(system_page_bytes(), 1, Access::Write)?;
    uffd.register_missing(region.whole())?;
    Ok((uffd.features(), uffd.scope()))
}

/// Whether the kernel gives the page table of a block of memory back when the whole of it
/// is dropped (6.14, where `CONFIG_PT_RECLAIM` is set). Found out once.
pub(crate) fn reclaims_page_tables() -> bool {
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

/// Fails on a kernel that is too old for windows.
///
/// # Errors
/// [`Error::Unsupported`].
pub(crate) fn check_kernel(operation: &'static str) -> error::Result<()> {
    if has_populate_read() {
        return Ok(());
    }
    let reason = format!(
        "windows need Linux 5.14 or later (MADV_POPULATE_READ), and this is Linux {}; use \
         `fremap.rows`, or `read` and `write` of a store, which work here",
        kernel_release()
    );
    Err(Error::Unsupported { operation, reason })
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

/// Whether a ring can be made.
fn io_uring() -> Result<(), Errno> {
    enter(Call::RingSetup)?;
    io_uring::IoUring::new(1).map(|_ring| ()).map_err(|error| errno_of(&error))
}

/// Whether the kernel has `cachestat` (6.5).
fn has_cachestat() -> Result<(), Errno> {
    let fd = file::memory_file("fremap-probe")?;
    cachestat::cached_pages(fd.as_fd(), 0, 1).map(|_| ())
}

/// Why a feature is missing.
#[derive(Clone, Copy, Debug)]
enum Lack {
    /// The kernel refused a call.
    Refused(Errno),
    /// The kernel does not offer it.
    NotOffered,
    /// It is a part of userfaultfd, which is missing.
    NoUserfaultfd,
}

fn feature(name: &str) -> &'static Feature {
    FEATURES.iter().find(|feature| feature.name == name).expect("a feature of the table")
}

fn probe(name: &str, found: Result<(), Lack>) -> Probe {
    let feature = feature(name);
    let (detail, remedy) = match found {
        Ok(()) => (feature.used_for.to_owned(), String::new()),
        Err(lack) => (describe_lack(lack), remedy(feature, lack)),
    };
    Probe { feature, available: found.is_ok(), detail, remedy }
}

fn describe_lack(lack: Lack) -> String {
    match lack {
        Lack::Refused(errno) => describe(errno),
        Lack::NotOffered => "this kernel does not have it".to_owned(),
        Lack::NoUserfaultfd => "userfaultfd is missing".to_owned(),
    }
}

/// Major and minor version of the running kernel.
fn running_kernel() -> (u32, u32) {
    let release = kernel_release();
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok()).unwrap_or(0);
    (next(), next())
}

/// Whether a seccomp filter watches this process.
fn is_filtered() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() == "2")
}

/// What would bring a feature that is missing. A kernel is advised only if it is newer
/// than the running one: some features came to old kernels of distributions.
fn remedy(feature: &Feature, lack: Lack) -> String {
    let newer = (running_kernel() < feature.kernel)
        .then(|| format!("Linux {} or later; this is {}", feature.since, kernel_release()));
    match (feature.name, lack, newer) {
        ("userfaultfd_kernel_faults", Lack::NotOffered, _) => {
            let device =
                if running_kernel() < (6, 1) { "" } else { ", or access to /dev/userfaultfd" };
            format!("CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1{device}")
        }
        (_, Lack::NoUserfaultfd, Some(newer)) => format!("comes with userfaultfd, on {newer}"),
        (_, Lack::NoUserfaultfd, None) => "comes with userfaultfd".to_owned(),
        ("sigbus_recovery", ..) => {
            "x86-64, and no other SIGBUS handler that replaces fremap's".to_owned()
        }
        (_, _, Some(newer)) => newer,
        (name, Lack::Refused(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN), None) => {
            format!("a higher limit (RLIMIT_NOFILE, RLIMIT_MEMLOCK, memory); the kernel has {name}")
        }
        ("io_uring", Lack::Refused(_), None) if io_uring_is_disabled() => {
            "sysctl kernel.io_uring_disabled=0".to_owned()
        }
        (name, Lack::Refused(Errno::PERM | Errno::NOSYS | Errno::ACCESS), None)
            if is_filtered() =>
        {
            format!(
                "a seccomp profile that allows {name} (the container's seccomp filter refuses it); \
                 `fremap doctor --seccomp` makes one"
            )
        }
        (name, Lack::Refused(Errno::PERM | Errno::ACCESS), None) => {
            format!("a security policy (SELinux, AppArmor) that allows {name}")
        }
        ("page_table_reclaim", ..) => "a kernel built with CONFIG_PT_RECLAIM".to_owned(),
        _ => {
            "a kernel built with it; this version could have it, but this build does not".to_owned()
        }
    }
}

fn io_uring_is_disabled() -> bool {
    let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    setting.is_ok_and(|text| text.trim() != "0")
}

/// What brings userfaultfd here, for messages of calls that need it.
pub(crate) fn userfaultfd_remedy() -> String {
    match userfaultfd() {
        Ok(_) => String::new(),
        Err(errno) => remedy(feature("userfaultfd"), Lack::Refused(errno)),
    }
}

/// The same for one of the features that a userfaultfd may lack.
pub(crate) fn userfaultfd_feature_remedy(name: &str) -> String {
    let lack = userfaultfd().map_or(Lack::NoUserfaultfd, |_| Lack::NotOffered);
    remedy(feature(name), lack)
}

fn userfaultfd_probes() -> Vec<Probe> {
    let uffd = userfaultfd();
    // What a window may ask for; not all of it at once.
    let features = uffd.and_then(|_| Uffd::supported());
    let part = |name, has: fn(Features) -> bool| {
        let found = match features {
            Ok(features) if has(features) => Ok(()),
            Ok(_) => Err(Lack::NotOffered),
            Err(_) => Err(Lack::NoUserfaultfd),
        };
        probe(name, found)
    };
    let kernel_faults = match uffd {
        Ok((_, FaultScope::UserAndKernel)) => Ok(()),
        Ok((_, FaultScope::UserOnly)) => Err(Lack::NotOffered),
        Err(_) => Err(Lack::NoUserfaultfd),
    };
    let mut kernel_faults = probe("userfaultfd_kernel_faults", kernel_faults);
    if uffd.is_ok() && !kernel_faults.available {
        "a system call that touches an absent page fails with EFAULT"
            .clone_into(&mut kernel_faults.detail);
    }
    vec![
        probe("userfaultfd", uffd.map(|_| ()).map_err(Lack::Refused)),
        kernel_faults,
        part("uffd_move", Features::swap),
        part("uffd_poison", Features::poison),
        part("uffd_wp", Features::write_protect),
        part("uffd_wp_async", Features::async_writes),
    ]
}

fn recovery_probe() -> Probe {
    let found = copy::recovery_available();
    let mut probe = probe("sigbus_recovery", found.clone().map_err(|_| Lack::NotOffered));
    if let Err(reason) = found {
        probe.detail = reason;
    }
    probe
}

/// Looks for every one of [`FEATURES`].
#[must_use]
pub fn capabilities() -> Vec<Probe> {
    let mut probes = userfaultfd_probes();
    probes.extend([
        probe("populate_read", has_populate_read().then_some(()).ok_or(Lack::NotOffered)),
        probe("guard_pages", guard_pages().map_err(Lack::Refused)),
        probe("process_madvise", OwnProcess::try_open().map(|_| ()).map_err(Lack::Refused)),
        probe("io_uring", io_uring().map_err(Lack::Refused)),
        probe("cachestat", has_cachestat().map_err(Lack::Refused)),
        probe("page_table_reclaim", reclaims_page_tables().then_some(()).ok_or(Lack::NotOffered)),
        recovery_probe(),
    ]);
    probes
}
