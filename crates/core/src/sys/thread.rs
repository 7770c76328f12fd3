//! Service threads, started with all signals blocked, and events that wake them.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::channel;
use std::thread::{Builder, JoinHandle};

use rustix::event::{eventfd, EventfdFlags};
use rustix::io::Errno;

use super::call::{answered, check, enter, Call};
use super::reserve;

/// A descriptor that can be read once something has happened, until that is cleared.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// Nothing has happened.
    ///
    /// # Errors
    /// EMFILE at the limit of descriptors.
    pub fn new() -> Result<Self, Errno> {
        enter(Call::Open)?;
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// It has happened.
    pub fn set(&self) {
        // Full means set.
        let _set = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// It is to happen again.
    pub fn clear(&self) {
        // Empty means cleared.
        let _cleared = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// EMFILE at the limit of descriptors.
    pub fn descriptor(&self) -> Result<OwnedFd, Errno> {
        super::file::duplicate(self.0.as_fd())
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Bytes of addresses that a thread takes to start: a stack, and its variables.
const START_BYTES: usize = 4 << 20;

/// Fails where `RLIMIT_AS` leaves too little for a thread to start: its stack alone is not enough
/// to run. Says whether there is such a limit, so that a thread has to run before the next one
/// starts: the C library ends the process where it lacks memory for a thread's variables, which
/// are made when the thread first uses one.
fn check_room_to_start() -> Result<bool, Errno> {
    let limited = rustix::process::getrlimit(rustix::process::Resource::As).current.is_some();
    if limited {
        let mut room: Vec<u8> = Vec::new();
        room.try_reserve_exact(START_BYTES).map_err(|_| Errno::AGAIN)?;
        if reserve::has(room.as_ptr()) {
            return Err(Errno::AGAIN);
        }
    }
    Ok(limited)
}

/// Starts a thread; waits until it runs if the caller `waits`, or if addresses are limited.
///
/// # Safety
/// What `body` borrows is there until the thread has ended.
unsafe fn start<'b>(
    name: &str,
    waits: bool,
    body: impl FnOnce() + Send + 'b,
) -> Result<JoinHandle<()>, Errno> {
    let waits = check_room_to_start()? || waits;
    let (runs, started) = channel();
    let run = move || {
        // Nobody waits any more where the caller has been ended.
        let _told = runs.send(());
        body();
    };
    // SAFETY: as the caller promises.
    let thread = unsafe { Builder::new().name(name.to_owned()).spawn_unchecked(run) };
    let thread = thread.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
    if waits {
        let _told = started.recv();
    }
    Ok(thread)
}

/// Starts a thread in which every signal is blocked, so that handlers run in the
/// application's threads alone. It runs when this returns, and has its variables: addresses may
/// be limited from the next moment on.
///
/// # Errors
/// EAGAIN at the limit of threads.
pub(crate) fn spawn_without_signals(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, Errno> {
    let caller = block_all_signals()?;
    // SAFETY: the body borrows nothing.
    let thread = unsafe { start(name, true, body) };
    set_signal_mask(&caller)?;
    thread
}

/// Threads of one call. Dropped, they have ended, also when the caller panics.
#[derive(Debug)]
pub(super) struct Crew<'w> {
    threads: Vec<JoinHandle<()>>,
    owner: u32,
    work: PhantomData<&'w ()>,
}

impl<'w> Crew<'w> {
    /// Starts as many threads as it can, up to `wanted`, which each do `work`, with all signals
    /// blocked.
    ///
    /// # Safety
    /// The crew is dropped before what it borrows is.
    pub(super) unsafe fn start(
        name: &str,
        wanted: usize,
        work: &'w (impl Fn() + Sync),
    ) -> Result<Self, Errno> {
        let owner = crate::sys::process::id();
        let mut crew = Self { threads: Vec::with_capacity(wanted), owner, work: PhantomData };
        let caller = block_all_signals()?;
        while crew.threads.len() < wanted {
            // SAFETY: the crew waits for the thread when it is dropped. In a child of fork, where
            // nobody waits, there is no such thread.
            let Ok(thread) = (unsafe { start(name, false, work) }) else { break };
            crew.threads.push(thread);
        }
        set_signal_mask(&caller)?;
        Ok(crew)
    }

    pub(super) fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether this process has the threads; a child of fork has none of them.
    pub(super) fn is_own(&self) -> bool {
        self.owner == crate::sys::process::id()
    }
}

impl Drop for Crew<'_> {
    fn drop(&mut self) {
        let is_own = self.is_own();
        for thread in self.threads.drain(..) {
            if is_own {
                // Nothing panics there.
                let _ended = thread.join();
            } else {
                std::mem::forget(thread);
            }
        }
    }
}

/// Does `work` in this thread and in up to `helpers` others, in which every signal is blocked, and
/// waits for all. Where no thread can be started there are fewer.
pub(crate) fn work_together(helpers: usize, work: impl Fn() + Sync) {
    // SAFETY: it is dropped when this function ends.
    let _helpers = unsafe { Crew::start("fremap-look", helpers, &work) };
    work();
}

/// Lets SIGBUS through to the calling thread: it is for the faults of its own, of files that
/// were cut short and of windows whose faults are signals. Where it is blocked the kernel ends
/// the process.
pub(crate) fn let_faults_through() -> Result<(), Errno> {
    enter(Call::SignalMask)?;
    // SAFETY: sigset_t is plain data; sigemptyset makes it valid, and both calls take it.
    answered(unsafe {
        let mut faults = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut faults);
        libc::sigaddset(&raw mut faults, libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const faults, std::ptr::null_mut())
    })
}

/// Blocks every signal in the calling thread and returns the mask from before.
pub(super) fn block_all_signals() -> Result<libc::sigset_t, Errno> {
    enter(Call::SignalMask)?;
    // SAFETY: sigset_t is plain data; sigfillset makes it valid.
    let mut all = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    let mut before = all;
    // SAFETY: both sets are valid for the calls.
    answered(unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before)
    })?;
    Ok(before)
}

/// Sets the calling thread's mask.
pub(super) fn set_signal_mask(mask: &libc::sigset_t) -> Result<(), Errno> {
    // SAFETY: the set is valid; no old one is asked for.
    answered(unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) })
}

/// Sends a thread of this process the SIGSEGV that a write to read-only memory would be
/// (`rt_tgsigqueueinfo`, 2.6.31), with the address as its value: only a thread itself may
/// say that a signal is a fault's. A process that ignores it gets the default from now on,
/// as from the kernel. A thread that blocks it gets it when it does not any more.
///
/// # Errors
/// ESRCH for a thread that is gone; EAGAIN at the limit of queued signals.
pub(crate) fn send_segv(thread: u32, address: u64) -> Result<(), Errno> {
    /// In words of eight bytes: where the value of a queued signal stands.
    const VALUE: usize = 3;
    // SAFETY: siginfo_t is plain data, for which zero is valid.
    let mut info = unsafe { std::mem::zeroed::<libc::siginfo_t>() };
    info.si_signo = libc::SIGSEGV;
    info.si_code = libc::SI_QUEUE;
    // SAFETY: siginfo_t is 128 bytes long and aligned to eight; a queued signal's value
    // stands behind the three integers, their padding, and the sender's two numbers.
    unsafe { (&raw mut info).cast::<u64>().add(VALUE).write(address) };
    // SAFETY: sigaction is plain data, for which zero is the default; the information is
    // valid for the call.
    check(unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut action);
        if action.sa_sigaction == libc::SIG_IGN {
            action = std::mem::zeroed();
            libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
        }
        let process = crate::sys::process::id();
        let signal = libc::SIGSEGV;
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, signal, &raw const info) as i32
    })
}

/// Faults of the calling thread that waited for a device so far (`getrusage`).
pub(crate) fn major_faults() -> u64 {
    major_faults_of(libc::RUSAGE_THREAD)
}

/// The same of all threads of the process.
pub(crate) fn process_major_faults() -> u64 {
    major_faults_of(libc::RUSAGE_SELF)
}

fn major_faults_of(who: i32) -> u64 {
    // SAFETY: rusage is plain data, for which zero is valid; the kernel fills it.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(who, &raw mut usage);
        usage
    };
    u64::try_from(usage.ru_majflt).unwrap_or(0)
}
