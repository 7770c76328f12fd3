//! userfaultfd: the descriptor, registration, and the operations that resolve faults.
//!
//! Defined here is what `linux-raw-sys` lacks. Features are probed at run time; unknown feature
//! bits are ignored.
//!
//! # References
//! `ioctl_userfaultfd(2)`, `Documentation/admin-guide/mm/userfaultfd.rst`

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general::{
    uffdio_api, uffdio_copy, uffdio_poison, uffdio_range, uffdio_register, uffdio_writeprotect,
    UFFDIO_COPY_MODE_WP, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFD_API,
    UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MOVE, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_POISON,
    UFFD_FEATURE_SIGBUS, UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_ASYNC, UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE, UFFD_USER_MODE_ONLY,
};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

use super::call::{check, enter, last_errno, Call};
use super::span::{system_page_bytes, Span};

const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;
const UFFDIO_API: libc::Ioctl = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::Ioctl = 0xC020_AA00;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_AA02;
const UFFDIO_COPY: libc::Ioctl = 0xC028_AA03;
const UFFDIO_MOVE: libc::Ioctl = 0xC028_AA05;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xC018_AA06;
const UFFDIO_POISON: libc::Ioctl = 0xC020_AA08;

const MOVE_MODE_DONTWAKE: u64 = 1;
const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;

/// Descriptors that outlive mistakes have numbers from here on, if the limit allows.
const KEEPER_FD: RawFd = 512;
/// How often an operation is tried again when the kernel says EAGAIN.
const MAX_RETRIES: u32 = 1000;

/// What the kernel's userfaultfd can do, as it says itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    const USED: u32 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
        | UFFD_FEATURE_SIGBUS
        | UFFD_FEATURE_THREAD_ID
        | UFFD_FEATURE_POISON
        | UFFD_FEATURE_WP_ASYNC
        | UFFD_FEATURE_MOVE;

    fn has(self, bit: u32) -> bool {
        self.0 & u64::from(bit) != 0
    }

    fn without(self, bit: u32, absent: bool) -> Self {
        Self(if absent { self.0 & !u64::from(bit) } else { self.0 })
    }

    /// Faults that are SIGBUS in the thread that has them (4.14).
    #[must_use]
    pub fn signals(self) -> bool {
        self.has(UFFD_FEATURE_SIGBUS)
    }

    /// Write protection of anonymous memory (5.7).
    pub(crate) fn write_protect(self) -> bool {
        self.has(UFFD_FEATURE_PAGEFAULT_FLAG_WP)
    }

    /// `UFFDIO_POISON` (6.6).
    pub(crate) fn poison(self) -> bool {
        self.has(UFFD_FEATURE_POISON)
    }

    /// Stores to protected pages that the kernel notes without a fault, to be asked
    /// for by `PAGEMAP_SCAN` (6.7).
    pub(crate) fn async_writes(self) -> bool {
        self.has(UFFD_FEATURE_WP_ASYNC) && self.write_protect()
    }

    /// `UFFDIO_MOVE` (6.8) into ranges registered for write protection, which is
    /// how frames are taken back out of a window.
    #[must_use]
    pub fn swap(self) -> bool {
        self.has(UFFD_FEATURE_MOVE) && self.write_protect()
    }
}

/// How a write to a write-protected page is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// It is a fault, as a touch of an absent page is.
    Fault,
    /// The kernel lets it through and notes the page ([`Features::async_writes`]).
    AreNoted,
}

/// A thread that stands still at an address until it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub address: u64,
    /// Whether it wants to store there.
    pub stores: bool,
    /// Whether the page is there, and write-protected.
    pub protected: bool,
    /// The thread, by its number; 0 where the kernel does not tell (before 4.14).
    pub thread: u32,
}

/// What a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Told to who reads the descriptor; the thread waits.
    Message,
    /// SIGBUS in the thread ([`Features::signals`]).
    Signal,
}

/// Which faults can be served: those of user code only, or also those of system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultScope {
    /// A system call that touches an absent page gets EFAULT.
    UserOnly,
    /// System calls wait for the page as user code does.
    UserAndKernel,
}

/// An operation that stopped after `done_bytes`.
#[derive(Clone, Copy, Debug)]
pub struct Partial {
    /// Bytes from the front that were done.
    pub done_bytes: usize,
    /// Why it stopped.
    pub errno: Errno,
}

impl Partial {
    /// The same stop, told from `before` bytes further in front.
    #[must_use]
    pub fn after(self, before: usize) -> Self {
        Self { done_bytes: self.done_bytes + before, ..self }
    }
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// An open userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// A second descriptor of the same, out of the way: when the last one is
    /// closed, the kernel fills absent pages with zeros, and a program that
    /// closes a descriptor twice, or a range of them, may hit the first.
    _keeper: OwnedFd,
    features: Features,
    scope: FaultScope,
}

fn range(span: Span<'_>) -> uffdio_range {
    uffdio_range { start: span.start() as u64, len: span.len() as u64 }
}

fn open_system_call(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    enter(Call::UffdOpen)?;
    // SAFETY: of this process's memory only what is registered is changed by the descriptor.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// `/dev/userfaultfd` (6.1): users who may open it get kernel faults, too.
fn open_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    use rustix::fs::{Mode, OFlags};
    enter(Call::UffdOpen)?;
    let device =
        rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags and returns a descriptor or -1.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags.bits()) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn open_descriptor(widest: FaultScope) -> Result<(OwnedFd, FaultScope), Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if widest == FaultScope::UserAndKernel {
        if let Ok(fd) = open_system_call(flags) {
            return Ok((fd, FaultScope::UserAndKernel));
        }
        if let Ok(fd) = open_device(flags) {
            return Ok((fd, FaultScope::UserAndKernel));
        }
    }
    let user_only = UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
    Ok((open_system_call(flags | user_only)?, FaultScope::UserOnly))
}

fn handshake(fd: &OwnedFd, features: u64) -> Result<Features, Errno> {
    let mut argument = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
    // SAFETY: the argument is the kernel's, and outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut argument) })?;
    Ok(Features(argument.features))
}

/// Makes a request again, for a while, as long as the kernel says EAGAIN.
fn patiently(mut request: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 0..MAX_RETRIES {
        match request() {
            Err(Errno::AGAIN) => {}
            outcome => return outcome,
        }
    }
    Err(Errno::AGAIN)
}

/// Has the faults of a range delivered to `fd`.
fn register(fd: &OwnedFd, range: uffdio_range, mode: u32) -> Result<(), Errno> {
    enter(Call::UffdRegister)?;
    let mut argument = uffdio_register { range, mode: mode.into(), ioctls: 0 };
    // SAFETY: the argument is the kernel's; the range is memory that fremap has mapped.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut argument) })
}

/// A second descriptor of a userfaultfd, with a number that no program closes by mistake.
fn keeper_of(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, KEEPER_FD)
        .or_else(|_| rustix::io::fcntl_dupfd_cloexec(fd, 0))
}

/// A userfaultfd of a child of fork, for memory that it has just mapped: faults there are
/// SIGBUS in the thread that has them (4.14). Its number is one that no child closes or
/// gives to another file, as they do with low ones. Allocates nothing.
pub(super) fn open_in_child(start: *mut c_void, len: usize) -> Result<OwnedFd, Errno> {
    let (low, _) = open_descriptor(FaultScope::UserOnly)?;
    let fd = keeper_of(&low)?;
    drop(low);
    handshake(&fd, UFFD_FEATURE_SIGBUS.into())?;
    let range = uffdio_range { start: start as u64, len: len as u64 };
    register(&fd, range, UFFDIO_REGISTER_MODE_MISSING)?;
    Ok(fd)
}

/// `UFFDIO_COPY` (4.3) by the descriptor of a child of fork. Pages that are there already
/// stay. Allocates nothing.
///
/// # Errors
/// EAGAIN while the mapping changes.
pub(crate) fn copy_in_child(uffd: RawFd, to: Span<'_>, from: Span<'_>) -> Result<(), Errno> {
    let page = system_page_bytes();
    for at in (0..to.len()).step_by(page) {
        enter(Call::UffdCopy)?;
        let mut argument = uffdio_copy {
            dst: to.part(at, page).start() as u64,
            src: from.part(at, page).start() as u64,
            len: page as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the argument is the kernel's; both ranges are spans, mapped by their promise.
        match check(unsafe { libc::ioctl(uffd, UFFDIO_COPY, &raw mut argument) }) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

impl Uffd {
    /// What this kernel's userfaultfd has.
    ///
    /// # Errors
    /// ENOSYS without userfaultfd, EPERM where it is refused (seccomp).
    pub(crate) fn supported() -> Result<Features, Errno> {
        let (probe, _) = open_descriptor(FaultScope::UserAndKernel)?;
        let supported = handshake(&probe, 0)?;
        Ok(Features(supported.0 & u64::from(Features::USED))
            .without(UFFD_FEATURE_MOVE, enter(Call::ProbeMove).is_err())
            .without(UFFD_FEATURE_POISON, enter(Call::ProbePoison).is_err())
            .without(UFFD_FEATURE_PAGEFAULT_FLAG_WP, enter(Call::ProbeWriteProtect).is_err())
            .without(UFFD_FEATURE_WP_ASYNC, enter(Call::ProbeAsync).is_err()))
    }

    /// Opens a userfaultfd with every feature that fremap uses and this kernel has, and
    /// no wider a scope than `widest`.
    ///
    /// # Errors
    /// ENOSYS without userfaultfd, EPERM where it is refused (seccomp), EINVAL where
    /// the kernel notes no stores, or raises no signals.
    pub fn open(stores: Stores, delivery: Delivery, widest: FaultScope) -> Result<Self, Errno> {
        let supported = Self::supported()?;
        let noted = stores == Stores::AreNoted;
        let signals = delivery == Delivery::Signal;
        if (noted && !supported.async_writes()) || (signals && !supported.signals()) {
            return Err(Errno::INVAL);
        }
        let (fd, scope) = open_descriptor(widest)?;
        let features =
            supported.without(UFFD_FEATURE_WP_ASYNC, !noted).without(UFFD_FEATURE_SIGBUS, !signals);
        handshake(&fd, features.0)?;
        let keeper = keeper_of(&fd)?;
        Ok(Self { fd, _keeper: keeper, features, scope })
    }

    /// What this kernel's userfaultfd has.
    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Whose faults are served.
    #[must_use]
    pub fn scope(&self) -> FaultScope {
        self.scope
    }

    /// The descriptor, to wait on.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Has the faults of absent pages of `memory` delivered here.
    ///
    /// # Errors
    /// EINVAL for memory that does not take it.
    pub(crate) fn register_missing(&self, memory: Span<'_>) -> Result<(), Errno> {
        register(&self.fd, range(memory), UFFDIO_REGISTER_MODE_MISSING)
    }

    /// Has the faults of absent pages of `memory` delivered here, and makes it a
    /// range whose pages can be write-protected (5.7).
    ///
    /// # Errors
    /// EINVAL for memory that does not take it.
    pub(crate) fn register_missing_and_protected(&self, memory: Span<'_>) -> Result<(), Errno> {
        register(&self.fd, range(memory), UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
    }

    /// Makes `memory` a place that [`move_pages`](Self::move_pages) may move to,
    /// while its own faults stay the kernel's.
    ///
    /// # Errors
    /// EINVAL for memory that does not take it.
    pub(crate) fn register_move_target(&self, memory: Span<'_>) -> Result<(), Errno> {
        register(&self.fd, range(memory), UFFDIO_REGISTER_MODE_WP)
    }

    fn transfer(
        &self,
        call: Call,
        request: libc::Ioctl,
        to: Span<'_>,
        from: Span<'_>,
        mode: u64,
    ) -> Result<(), Partial> {
        assert_eq!(to.len(), from.len(), "ranges of different lengths");
        let mut done_bytes = 0;
        let mut retries = 0;
        while done_bytes < to.len() {
            let moves = call == Call::UffdMove;
            let answer = if moves { enter(Call::UffdMoveAnswer) } else { Ok(()) };
            // The kernel wakes nobody for what it says it has not moved.
            let quiet = if answer.is_ok() { 0 } else { MOVE_MODE_DONTWAKE };
            let mut argument = uffdio_copy {
                dst: to.start() as u64 + done_bytes as u64,
                src: from.start() as u64 + done_bytes as u64,
                len: (to.len() - done_bytes) as u64,
                mode: mode | quiet,
                copy: 0,
            };
            let result = enter(call).and_then(|()| {
                // SAFETY: the argument is the kernel's, and struct uffdio_move is like it; both
                // ranges are spans, mapped by their promise.
                check(unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw mut argument) })
            });
            match result {
                Ok(()) => return answer.map_err(|errno| Partial { done_bytes, errno }),
                Err(errno) => {
                    // The kernel reports progress as a positive count and a
                    // lack of it as a negative errno in the same field.
                    done_bytes += usize::try_from(argument.copy).unwrap_or(0);
                    retries += 1;
                    if errno != Errno::AGAIN || retries > MAX_RETRIES {
                        return Err(Partial { done_bytes, errno });
                    }
                }
            }
        }
        Ok(())
    }

    /// `UFFDIO_COPY` (4.3): fills absent pages with a copy of `from`, atomically
    /// a page, and wakes the threads that wait for them.
    ///
    /// # Errors
    /// EEXIST where a page is present already.
    pub fn copy(&self, to: Span<'_>, from: Span<'_>) -> Result<(), Partial> {
        self.transfer(Call::UffdCopy, UFFDIO_COPY, to, from, 0)
    }

    /// The same with `UFFDIO_COPY_MODE_WP` (5.7): the pages arrive write-protected.
    pub(crate) fn copy_protected(&self, to: Span<'_>, from: Span<'_>) -> Result<(), Partial> {
        self.transfer(Call::UffdCopy, UFFDIO_COPY, to, from, UFFDIO_COPY_MODE_WP.into())
    }

    /// `UFFDIO_WRITEPROTECT` (5.7): protects pages that are present from stores, or
    /// lets writes to them again and wakes the threads that wait for that.
    ///
    /// # Errors
    /// ENOENT for a range that is not registered for it; EAGAIN while the mapping changes.
    pub(crate) fn write_protect(&self, span: Span<'_>, protect: bool) -> Result<(), Errno> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        patiently(|| {
            enter(Call::UffdWriteProtect)?;
            let mut argument = uffdio_writeprotect { range: range(span), mode };
            // SAFETY: the argument is the kernel's, and outlives the call.
            check(unsafe {
                libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut argument)
            })
        })
    }

    /// `UFFDIO_MOVE` (6.8): moves all pages of `from`, which are present, to
    /// absent ones of `to` without copying, and wakes the threads that wait for them.
    ///
    /// # Errors
    /// EEXIST where a page of `to` is present, ENOENT where one of `from` is not,
    /// EBUSY for a page that is pinned or shared with a child, EINVAL for ranges
    /// that do not allow it.
    ///
    /// Linux 6.18 may say EEXIST for pages that it has moved: when it met one that
    /// was being migrated (compaction does that) it moves it, takes it for not
    /// moved, and finds the target taken. So after EEXIST ask where each page is.
    pub(crate) fn move_pages(&self, to: Span<'_>, from: Span<'_>) -> Result<(), Partial> {
        self.transfer(Call::UffdMove, UFFDIO_MOVE, to, from, 0)
    }

    /// The same for the pages of `from` that are present; the others are skipped.
    ///
    /// # Errors
    /// As [`move_pages`](Self::move_pages), but for ENOENT.
    pub(crate) fn move_present_pages(&self, to: Span<'_>, from: Span<'_>) -> Result<(), Partial> {
        self.transfer(Call::UffdMove, UFFDIO_MOVE, to, from, MOVE_MODE_ALLOW_SRC_HOLES)
    }

    /// `UFFDIO_POISON` (6.6): a touch of these absent pages is SIGBUS.
    ///
    /// # Errors
    /// EEXIST where a page is present, EINVAL on older kernels.
    pub(crate) fn poison(&self, span: Span<'_>) -> Result<(), Errno> {
        let mut done = 0;
        patiently(|| {
            if done == span.len() {
                return Ok(());
            }
            enter(Call::UffdPoison)?;
            let range = range(span.part(done, span.len() - done));
            let mut argument = uffdio_poison { range, mode: 0, updated: 0 };
            // SAFETY: the argument is the kernel's, and outlives the call.
            let poisoned = check(unsafe {
                libc::ioctl(self.fd.as_raw_fd(), UFFDIO_POISON, &raw mut argument)
            });
            done += usize::try_from(argument.updated).unwrap_or(0);
            poisoned
        })
    }

    /// `UFFDIO_WAKE` (4.3): lets the threads that wait for these pages touch them again.
    ///
    /// # Errors
    /// EINVAL for a range that is not mapped.
    pub(crate) fn wake(&self, span: Span<'_>) -> Result<(), Errno> {
        enter(Call::UffdWake)?;
        let mut argument = range(span);
        // SAFETY: the argument is the kernel's, and outlives the call.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut argument) })
    }

    /// Takes the faults that wait, without blocking.
    ///
    /// # Errors
    /// EAGAIN when there is none.
    pub fn faults(&self, faults: &mut Vec<Fault>) -> Result<(), Errno> {
        const BATCH: usize = 16;
        enter(Call::UffdRead)?;
        let empty = Message { event: 0, reserved: [0; 7], flags: 0, address: 0, thread: 0 };
        let mut messages = [empty; BATCH];
        let bytes = std::mem::size_of_val(&messages);
        // SAFETY: the kernel writes whole struct uffd_msg, whose layout Message
        // has, and no more than `bytes`.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), bytes) };
        let Ok(read) = usize::try_from(read) else {
            return Err(last_errno());
        };
        let count = read / std::mem::size_of::<Message>();
        let of_pages = messages[..count]
            .iter()
            .filter(|message| u32::from(message.event) == UFFD_EVENT_PAGEFAULT);
        faults.extend(of_pages.map(|message| Fault {
            address: message.address,
            stores: message.flags & u64::from(UFFD_PAGEFAULT_FLAG_WRITE) != 0,
            protected: message.flags & u64::from(UFFD_PAGEFAULT_FLAG_WP) != 0,
            thread: message.thread as u32,
        }));
        Ok(())
    }
}
