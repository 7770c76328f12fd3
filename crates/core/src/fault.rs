//! The thread that serves a window's faults.
//!
//! It waits for the faults at which other threads stand still and hands them
//! to the engine, one by one. It never runs Python, blocks every signal, and
//! waits for no lock that is held across I/O.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::{spawn_without_signals, Wake, Waker};
use crate::sys::uffd::{Fault, Uffd};

/// Who resolves the faults of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultMode {
    /// A thread of the window's own; who touches an absent page waits for it.
    Thread,
    /// The thread that touches the page, in a handler of SIGBUS.
    Signal,
}

/// Who can resolve a fault.
pub trait Serve: Send + Sync + 'static {
    /// Where faults are announced.
    fn uffd(&self) -> &Uffd;

    /// Ends a fault: with content, by letting the store through, or by making it a signal.
    fn serve(&self, fault: Fault);

    /// Whether there is something to [read ahead](Self::read_ahead) while no fault waits.
    fn plans_ahead(&self) -> bool;

    /// Brings some of what is likely to be touched next. Adds the faults that it has found
    /// `waiting`, which are to be served.
    fn read_ahead(&self, waiting: &mut Vec<Fault>);
}

/// A running fault thread; dropped, it ends.
#[derive(Debug)]
pub struct FaultThread {
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
    owner: u32,
}

impl FaultThread {
    /// Starts serving.
    ///
    /// # Errors
    /// EAGAIN or EMFILE at the limits of threads and descriptors.
    pub fn start(server: Arc<impl Serve>) -> Result<Self, Errno> {
        let waker = Arc::new(Waker::new()?);
        let listener = Arc::clone(&waker);
        let body = move || {
            let outcome = catch_unwind(AssertUnwindSafe(|| run(server.as_ref(), &listener)));
            if outcome.is_err() {
                // Every thread that touches the window from now on would wait
                // for ever: an end that says so is better.
                stderr_line(format_args!("the thread that serves faults panicked, which is a bug"));
                std::process::abort();
            }
        };
        let thread = spawn_without_signals("fremap-fault", body)?;
        Ok(Self { waker, thread: Some(thread), owner: crate::sys::process::id() })
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.owner != crate::sys::process::id() {
            // A child of fork has no such thread: there is nothing to join.
            std::mem::forget(thread);
            return;
        }
        if self.waker.wake().is_ok() && thread.join().is_err() {
            stderr_line(format_args!("the fault thread of a window that is closed had panicked"));
        }
    }
}

/// How long the thread looks for the next fault before it sleeps: to be woken can take it
/// several times as long as to serve one (docs/decisions/013).
const LOOK: Duration = Duration::from_micros(50);
/// Waits without looking, at most, after nothing had come in that time.
const MOST_SKIPPED: u32 = 255;

/// Whether it is worth looking for the next fault, by how soon the last ones came.
#[derive(Debug, Default)]
struct Watch {
    /// Waits that are left without looking.
    skips: u32,
    /// How many they were the last time.
    skipped: u32,
}

impl Watch {
    /// Whether to look in this wait.
    fn looks(&mut self) -> bool {
        let skips = self.skips > 0;
        self.skips -= u32::from(skips);
        !skips
    }

    /// Something came while the thread looked.
    fn found(&mut self) {
        self.skipped = 0;
    }

    /// Nothing did: it looks half as often.
    fn missed(&mut self) {
        self.skipped = (2 * self.skipped + 1).min(MOST_SKIPPED);
        self.skips = self.skipped;
    }
}

/// Waits for faults or the waker, awake at first where that is worth it.
fn wait(waker: &Waker, uffd: &Uffd, watch: &mut Watch) -> Result<Wake, Errno> {
    if watch.looks() {
        let begin = Instant::now();
        while begin.elapsed() < LOOK {
            let wake = waker.wait_for(uffd.fd(), true)?;
            if wake != Wake::Nothing {
                watch.found();
                return Ok(wake);
            }
            // Who is about to touch a page may need this processor.
            std::thread::yield_now();
        }
        watch.missed();
    }
    waker.wait_for(uffd.fd(), false)
}

fn run(server: &impl Serve, waker: &Waker) {
    let mut faults = Vec::with_capacity(16);
    let mut watch = Watch::default();
    loop {
        faults.clear();
        let wake = if server.plans_ahead() {
            waker.wait_for(server.uffd().fd(), true)
        } else {
            wait(waker, server.uffd(), &mut watch)
        };
        match wake {
            Ok(Wake::Ready) => take_faults(server.uffd(), &mut faults),
            Ok(Wake::Nothing) => server.read_ahead(&mut faults),
            Ok(Wake::Asked) => return,
            Err(errno) => {
                stderr_line(format_args!("waiting for faults failed ({errno}); trying again"));
                std::thread::yield_now();
            }
        }
        for &fault in &faults {
            server.serve(fault);
        }
    }
}

fn take_faults(uffd: &Uffd, faults: &mut Vec<Fault>) {
    match uffd.faults(faults) {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
        Err(Errno::BADF) => {
            // Whoever touches an absent page would wait for ever.
            stderr_line(format_args!(
                "the userfaultfd of a window was closed by somebody else: a descriptor \
                 was closed twice, or a range of them"
            ));
            std::process::abort();
        }
        Err(errno) => stderr_line(format_args!("reading faults failed ({errno}); trying again")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_looks_while_faults_come_soon_and_seldom_where_they_do_not() {
        let mut watch = Watch::default();
        for _ in 0..100 {
            assert!(watch.looks());
            watch.found();
        }
        for skipped in [1, 3, 7, 15, 31, 63, 127, 255, 255] {
            assert!(watch.looks());
            watch.missed();
            for _ in 0..skipped {
                assert!(!watch.looks());
            }
        }
        assert!(watch.looks());
        watch.found();
        assert!(watch.looks());
        watch.missed();
        assert!(!watch.looks());
        assert!(watch.looks());
    }
}
