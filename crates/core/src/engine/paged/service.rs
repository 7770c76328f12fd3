//! The service that serves the faults of all windows of the process.
//!
//! One thread waits for faults of other threads, and hands each to its window. It never waits for a
//! device: a fault whose page is not in the page cache is *parked* until the page has arrived, and
//! the thread serves others meanwhile. Work that has to wait is done by a few *helpers*, threads
//! that start when they are needed and exit when they are not. None of these threads runs Python
//! code, all block every signal, and none waits for a lock that is held across I/O.

mod helpers;
mod polling;

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use super::server::{Served, Server, Ticket};
use crate::sys::arrivals::{Arrivals, MOST_ARRIVALS};
use crate::sys::lock::lock;
use crate::sys::per_process::PerProcess;
use crate::sys::poller::Poller;
use crate::sys::process;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::{spawn_without_signals, Event};
use crate::sys::uffd::{Fault, Uffd};
use helpers::Helpers;
use polling::Polling;

/// How long the thread looks for the next fault, and for a page that a device reads, before it
/// sleeps (docs/decisions/013): to be woken takes several times as long as to serve a fault.
const NEXT_FAULT: Duration = Duration::from_micros(50);
const NEXT_ARRIVAL: Duration = Duration::from_micros(100);

/// The names of the service's own descriptors; those of windows are smaller.
const WAKER: u64 = u64::MAX;
const ARRIVALS: u64 = u64::MAX - 1;

/// The windows of the service.
#[derive(Debug)]
struct Registry {
    windows: HashMap<u64, Arc<Server>>,
    next: u64,
    /// Windows that are gone, of which the thread may still know something.
    leaving: Vec<u64>,
    /// How many things helpers do for each window.
    helped: HashMap<u64, usize>,
    /// Faults that helpers have found waiting.
    found: Vec<(u64, Fault)>,
    /// Windows for which a helper has ended something: there may be more to read ahead.
    served: Vec<u64>,
    ends: bool,
}

impl Registry {
    /// Helpers have so many things less to do for a window; whether it was the last.
    fn ended(&mut self, name: u64, count: usize) -> bool {
        let Some(helped) = self.helped.get_mut(&name) else { return false };
        *helped -= count;
        let last = *helped == 0;
        if last {
            self.helped.remove(&name);
        }
        last
    }
}

/// What the thread and others share.
#[derive(Debug)]
struct ServiceState {
    poller: Poller,
    waker: Event,
    registry: Mutex<Registry>,
    /// The thread, or a helper, knows nothing of a window any more.
    left: Condvar,
}

/// The running service; dropped, it ends.
#[derive(Debug)]
pub(super) struct Service {
    shared: Arc<ServiceState>,
    thread: Option<JoinHandle<()>>,
    owner: u32,
}

/// A window that is served; dropped, it is not any more, and nobody works on it.
#[derive(Debug)]
pub(super) struct ServedWindow {
    service: Option<Arc<Service>>,
    server: Arc<Server>,
    name: u64,
}

impl ServedWindow {
    /// Has a window served, by the service that runs or a new one.
    pub(super) fn start(service: &PerProcess<Service>, server: Arc<Server>) -> Result<Self, Errno> {
        let service = service.get(Service::start)?;
        let mut registry = lock(&service.shared.registry);
        let name = registry.next;
        registry.next += 1;
        registry.windows.insert(name, Arc::clone(&server));
        let added = service.shared.poller.add(server.uffd().fd(), name);
        if added.is_err() {
            registry.windows.remove(&name);
        }
        drop(registry);
        added.map(|()| Self { service: Some(service), server, name })
    }
}

impl Service {
    fn start() -> Result<Self, Errno> {
        let registry = Registry {
            windows: HashMap::new(),
            next: 0,
            leaving: Vec::new(),
            helped: HashMap::new(),
            found: Vec::new(),
            served: Vec::new(),
            ends: false,
        };
        let (poller, waker) = (Poller::new()?, Event::new()?);
        poller.add(&waker, WAKER)?;
        let registry = Mutex::new(registry);
        let shared = Arc::new(ServiceState { poller, waker, registry, left: Condvar::new() });
        let own = Arc::clone(&shared);
        let body = move || {
            let run = || Loop::new(own).run();
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                // Every thread that touches a window from now on would wait
                // forever: an end that says so is better.
                stderr_line(format_args!("the thread that serves faults panicked, which is a bug"));
                std::process::abort();
            }
        };
        let thread = spawn_without_signals("fremap-fault", body)?;
        Ok(Self { shared, thread: Some(thread), owner: process::id() })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.owner != process::id() {
            // A child of fork has no such thread: there is nothing to join.
            std::mem::forget(thread);
            return;
        }
        lock(&self.shared.registry).ends = true;
        self.shared.waker.set();
        if thread.join().is_err() {
            stderr_line(format_args!("the thread that serves faults had panicked at its end"));
        }
    }
}

impl Drop for ServedWindow {
    fn drop(&mut self) {
        let Some(service) = self.service.take() else { return };
        if service.owner != process::id() {
            // A child of fork has no such thread, and its parent's locks may be taken.
            std::mem::forget(service);
            return;
        }
        let shared = &service.shared;
        self.server.leave();
        // A copy of the descriptor, as in a child of fork, would keep it there.
        let _removed = shared.poller.remove(self.server.uffd().fd());
        let mut registry = lock(&shared.registry);
        registry.windows.remove(&self.name);
        registry.leaving.push(self.name);
        shared.waker.set();
        while registry.leaving.contains(&self.name) || registry.helped.contains_key(&self.name) {
            registry = shared.left.wait(registry).unwrap_or_else(PoisonError::into_inner);
        }
        drop(registry);
    }
}

/// What the thread knows.
struct Loop {
    shared: Arc<ServiceState>,
    helpers: Helpers,
    /// What was parked. None until a page was not in the page cache, and where the kernel gives
    /// no ring.
    arrivals: Option<Arrivals<(u64, Ticket)>>,
    refused: bool,
    /// Faults that begin later.
    later: Vec<(u64, Fault)>,
    /// Windows of which something is to be read ahead.
    ahead: Vec<u64>,
    /// Something was ended since the last wait: whoever waited for it may fault again soon.
    ended: bool,
    /// For the faults of threads that go on,
    next_fault: Polling,
    /// and for pages that were parked for: a slow device says nothing of how soon threads fault.
    next_arrival: Polling,
}

impl Loop {
    fn new(shared: Arc<ServiceState>) -> Self {
        let helpers = Helpers::new(Arc::clone(&shared));
        let (later, ahead) = (Vec::new(), Vec::new());
        Self {
            shared,
            helpers,
            arrivals: None,
            refused: false,
            later,
            ahead,
            ended: false,
            next_fault: Polling::new(NEXT_FAULT),
            next_arrival: Polling::new(NEXT_ARRIVAL),
        }
    }

    fn run(&mut self) {
        let mut ready = Vec::with_capacity(16);
        let mut faults = Vec::with_capacity(16);
        let mut arrived = Vec::with_capacity(MOST_ARRIVALS);
        loop {
            ready.clear();
            if let Err(errno) = self.wait(&mut ready) {
                stderr_line(format_args!("waiting for faults failed ({errno}); trying again"));
                std::thread::yield_now();
            }
            for &name in &ready {
                match name {
                    WAKER if self.follow() => {}
                    WAKER => return,
                    ARRIVALS => self.resume(&mut arrived, &mut faults),
                    name => self.serve_window(name, &mut faults),
                }
            }
            if ready.is_empty() {
                self.read_ahead(&mut faults);
            } else {
                self.serve_later();
            }
            self.start_waiting();
        }
    }

    /// Waits for something to do. Polls before it sleeps, if that pays.
    fn wait(&mut self, ready: &mut Vec<u64>) -> Result<(), Errno> {
        let poller = &self.shared.poller;
        if !self.ahead.is_empty() {
            return poller.wait(true, ready);
        }
        let mut look = |polling: &mut Polling| {
            polling.look(|| {
                poller.wait(true, ready)?;
                Ok(!ready.is_empty())
            })
        };
        let ended = std::mem::take(&mut self.ended);
        let found = ended && look(&mut self.next_fault)?;
        if !found && self.arrivals.as_ref().is_some_and(Arrivals::waits) {
            look(&mut self.next_arrival)?;
        }
        while ready.is_empty() {
            poller.wait(false, ready)?;
        }
        Ok(())
    }

    /// Forgets windows that are gone. Returns false when the service ends.
    fn follow(&mut self) -> bool {
        self.shared.waker.clear();
        let mut registry = lock(&self.shared.registry);
        for name in std::mem::take(&mut registry.leaving) {
            if let Some(arrivals) = &mut self.arrivals {
                arrivals.retain(|&(of, _)| of != name);
            }
            self.later.retain(|&(of, _)| of != name);
            self.ahead.retain(|&of| of != name);
            registry.ended(name, self.helpers.forget(name));
        }
        // Those of windows that are gone are not served.
        self.later.append(&mut registry.found);
        self.shared.left.notify_all();
        let (goes_on, served) = (!registry.ends, std::mem::take(&mut registry.served));
        drop(registry);
        for name in served {
            if let Some(server) = self.window(name) {
                self.note_ahead(name, &server);
            }
        }
        goes_on
    }

    fn window(&self, name: u64) -> Option<Arc<Server>> {
        lock(&self.shared.registry).windows.get(&name).cloned()
    }

    fn serve_window(&mut self, name: u64, faults: &mut Vec<Fault>) {
        let Some(server) = self.window(name) else { return };
        take_faults(server.uffd(), faults);
        self.serve_all(name, &server, faults);
    }

    fn serve_all(&mut self, name: u64, server: &Arc<Server>, faults: &mut Vec<Fault>) {
        for fault in faults.drain(..) {
            match server.serve(fault) {
                Served::Later => self.later.push((name, fault)),
                outcome => self.park_or_help(name, server, outcome),
            }
        }
        self.note_ahead(name, server);
    }

    fn note_ahead(&mut self, name: u64, server: &Arc<Server>) {
        if server.plans_ahead() && !self.ahead.contains(&name) {
            self.ahead.push(name);
        }
    }

    /// Parks a fault that has to wait for its page, or gives it to a helper.
    fn park_or_help(&mut self, name: u64, server: &Arc<Server>, outcome: Served) {
        match outcome {
            Served::Done => self.ended = true,
            Served::Later => {}
            Served::Parked { ticket, file, offset_bytes } => {
                let unparked = match self.arrivals() {
                    Some(arrivals) => arrivals.push(file, offset_bytes, (name, ticket)),
                    None => Err((name, ticket)),
                };
                if unparked.is_err() {
                    self.helpers.help(name, server, ticket);
                }
            }
            Served::Waits(ticket) => self.helpers.help(name, server, ticket),
        }
    }

    /// The ring, if there is one; set up when it is first wanted.
    fn arrivals(&mut self) -> Option<&mut Arrivals<(u64, Ticket)>> {
        if self.arrivals.is_none() && !self.refused {
            let ready = Arrivals::new().and_then(|arrivals| {
                self.shared.poller.add(arrivals.descriptor(), ARRIVALS)?;
                Ok(arrivals)
            });
            match ready {
                Ok(arrivals) => self.arrivals = Some(arrivals),
                // What passes (no memory, no descriptor) is tried again with the next.
                Err(errno) => {
                    let refusals = [Errno::NOSYS, Errno::PERM, Errno::ACCESS, Errno::INVAL];
                    self.refused = refusals.contains(&errno);
                }
            }
        }
        self.arrivals.as_mut()
    }

    /// Has the kernel tell of the arrivals that were parked for. Where it will not, helpers wait.
    fn start_waiting(&mut self) {
        if self.arrivals.as_mut().is_none_or(|arrivals| arrivals.start().is_ok()) {
            return;
        }
        let Some(arrivals) = self.arrivals.take() else { return };
        let _removed = self.shared.poller.remove(arrivals.descriptor());
        for (name, ticket) in arrivals.into_values() {
            if let Some(server) = self.window(name) {
                self.helpers.help(name, &server, ticket);
            }
        }
    }

    /// Goes on with the faults whose pages have arrived.
    fn resume(&mut self, arrived: &mut Vec<(u64, Ticket)>, faults: &mut Vec<Fault>) {
        let Some(arrivals) = &mut self.arrivals else { return };
        arrivals.take(arrived);
        for (name, ticket) in arrived.drain(..) {
            let Some(server) = self.window(name) else { continue };
            let outcome = server.resume(ticket, faults);
            self.park_or_help(name, &server, outcome);
            self.serve_all(name, &server, faults);
        }
    }

    /// Begins with faults for which there was no room before.
    fn serve_later(&mut self) {
        for (name, fault) in std::mem::take(&mut self.later) {
            let Some(server) = self.window(name) else { continue };
            self.serve_all(name, &server, &mut vec![fault]);
        }
    }

    fn read_ahead(&mut self, faults: &mut Vec<Fault>) {
        let Some(name) = self.ahead.pop() else { return };
        let Some(server) = self.window(name) else { return };
        let outcome = server.read_ahead(faults);
        self.park_or_help(name, &server, outcome);
        self.serve_all(name, &server, faults);
    }
}

fn take_faults(uffd: &Uffd, faults: &mut Vec<Fault>) {
    match uffd.faults(faults) {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
        Err(Errno::BADF) => {
            // Whoever touches an absent page would wait forever.
            stderr_line(format_args!(
                "the userfaultfd of a window was closed by somebody else: a descriptor \
                 was closed twice, or a range of them"
            ));
            std::process::abort();
        }
        Err(errno) => stderr_line(format_args!("reading faults failed ({errno}); trying again")),
    }
}
