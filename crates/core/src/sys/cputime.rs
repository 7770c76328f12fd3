//! Waiting until this process is busy, and how much of files it has mapped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::io::Errno;

use super::call::{check, enter, errno_of, Call};
use super::clock::timespec;
use super::span::system_page_bytes;

/// Goes to the waiting thread alone, which blocks it: no handler ever sees it. Linux sends it
/// for no reason of its own.
const SIGNAL: i32 = libc::SIGSTKFLT;

/// A timer of the calling thread's that runs while the process runs, and stands still while
/// it sleeps (`timer_create` of `CLOCK_PROCESS_CPUTIME_ID`, 2.6.12).
///
/// The thread has all signals blocked.
#[derive(Debug)]
pub struct BusyTimer {
    timer: Option<libc::timer_t>,
}

/// A thread that waits by a [`BusyTimer`], to [wake](Waiter::wake) it.
#[derive(Clone, Copy, Debug)]
pub struct Waiter {
    thread: libc::pid_t,
}

impl Waiter {
    /// The calling thread.
    pub(crate) fn this_thread() -> Self {
        // SAFETY: the call has no arguments and cannot fail.
        Self { thread: unsafe { libc::gettid() } }
    }

    /// Ends the thread's wait, or the next one. The caller knows that the thread has not ended.
    pub(crate) fn wake(self) -> Result<(), Errno> {
        // SAFETY: the signal goes to a thread of this process that blocks it.
        check(unsafe {
            libc::syscall(libc::SYS_tgkill, crate::sys::process::id(), self.thread, SIGNAL) as i32
        })
    }
}

impl BusyTimer {
    /// A timer for the calling thread; where there is none to be had (a filter, the limit of
    /// queued signals), [`wait_busy`](Self::wait_busy) goes by the clock on the wall.
    #[must_use]
    pub fn new() -> Self {
        // SAFETY: sigevent is plain data, for which zero is valid.
        let mut event = unsafe { std::mem::zeroed::<libc::sigevent>() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        event.sigev_notify_thread_id = Waiter::this_thread().thread;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: the event and the place for the timer are valid for the call.
        let made = unsafe {
            libc::timer_create(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut event, &raw mut timer)
        };
        Self { timer: (made == 0).then_some(timer) }
    }

    /// Waits until somebody [wakes](Waiter::wake) the thread, or for `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) {
        let timeout = timeout.map(timespec);
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the set is made valid by sigemptyset; no information is asked for.
        unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, SIGNAL);
            // Ends by a signal, at the timeout, or sooner: the caller looks again.
            libc::sigtimedwait(&raw const set, std::ptr::null_mut(), timeout);
        }
    }

    /// Waits until the process has used so much time of its processors, counted in ticks of
    /// the kernel's (1 to 10 ms). While nothing of it runs, this does not return.
    pub(crate) fn wait_busy(&self, busy: Duration) {
        let Some(timer) = self.timer else { return self.wait(Some(busy)) };
        let after = libc::itimerspec {
            it_interval: timespec(Duration::ZERO),
            it_value: timespec(busy.max(Duration::from_micros(1))),
        };
        // SAFETY: the timer is this thread's own, and the times are valid for the call.
        let set = unsafe { libc::timer_settime(timer, 0, &raw const after, std::ptr::null_mut()) };
        self.wait(if set == 0 { None } else { Some(busy) });
    }
}

impl Default for BusyTimer {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for BusyTimer {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            // SAFETY: the timer was made by this value and is deleted once.
            unsafe { libc::timer_delete(timer) };
        }
    }
}

/// Has the scheduler run the calling thread soon after it wakes, for a short while at a time
/// (`sched_setattr` with a slice of its own, 6.12). Older kernels take no notice.
pub(crate) fn prefer_short_slices() {
    /// `struct sched_attr` as of Linux 3.14.
    #[repr(C)]
    #[derive(Default)]
    struct SchedulingAttributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    const SLICE: Duration = Duration::from_micros(100);
    const TIMER_SLACK_NS: u64 = 1000;
    let mut attributes = SchedulingAttributes::default();
    let bytes = size_of::<SchedulingAttributes>() as u32;
    // SAFETY: the structure has the kernel's layout and the size that is given; the calls
    // change how the calling thread is scheduled and nothing else.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0);
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, bytes, 0) == 0
            && attributes.policy == libc::SCHED_OTHER as u32
        {
            attributes.runtime = SLICE.as_nanos() as u64;
            attributes.size = bytes;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
}

/// What the process has mapped of files and shared memory (`/proc/self/statm`).
#[derive(Debug)]
pub struct MappedBytes(File);

impl MappedBytes {
    /// Opens it for this process.
    ///
    /// # Errors
    /// ENOENT where `/proc` is not mounted.
    pub fn open() -> Result<Self, Errno> {
        let file = File::open("/proc/self/statm");
        file.map(Self).map_err(|error| errno_of(&error))
    }

    /// How many bytes there are now.
    ///
    /// # Errors
    /// EIO.
    pub fn now(&self) -> Result<u64, Errno> {
        enter(Call::Read)?;
        let mut text = [0; 128];
        let length = self.0.read_at(&mut text, 0);
        let length = length.map_err(|error| errno_of(&error))?;
        let text = std::str::from_utf8(&text[..length]).unwrap_or("");
        let pages = text.split(' ').nth(2).and_then(|pages| pages.parse::<u64>().ok());
        Ok(pages.ok_or(Errno::IO)? * system_page_bytes() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::thread::spawn_without_signals;
    use std::sync::mpsc::channel;

    #[test]
    fn a_busy_process_ends_the_wait_and_so_does_who_wakes_it() {
        let (send, receive) = channel();
        let thread = spawn_without_signals("test", move || {
            send.send(Waiter::this_thread()).unwrap();
            let timer = BusyTimer::new();
            timer.wait(None);
            timer.wait_busy(Duration::from_millis(1));
            send.send(Waiter::this_thread()).unwrap();
        })
        .unwrap();
        receive.recv().unwrap().wake().unwrap();
        // This loop is what keeps the process busy.
        while receive.try_recv().is_err() {
            std::hint::spin_loop();
        }
        thread.join().unwrap();
    }

    #[test]
    fn mapped_bytes_are_told() {
        // The program itself is a file that is mapped.
        assert!(MappedBytes::open().unwrap().now().unwrap() > 0);
    }
}
