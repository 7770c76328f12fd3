//! Helpers: threads for work that the service's own thread would have to wait for.

use std::collections::{HashMap, VecDeque};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::server::{Server, Ticket};
use super::ServiceState;
use crate::sys::lock::lock;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::spawn_without_signals;

/// Helpers at most.
const MOST_HELPERS: usize = 32;
/// Helpers of one window at most: one whose reads take long leaves some to the others.
const MOST_OF_ONE: usize = 8;
/// How long a helper waits for something to do before it ends.
const IDLE: Duration = Duration::from_secs(1);

/// Something that has to wait.
struct Job {
    name: u64,
    server: Arc<Server>,
    ticket: Ticket,
}

struct Jobs {
    waiting: VecDeque<Job>,
    /// How many jobs of each window a helper has.
    running: HashMap<u64, usize>,
    threads: usize,
    idle: usize,
    /// No more jobs will come.
    ends: bool,
}

impl Jobs {
    fn is_ready(&self, job: &Job) -> bool {
        self.running.get(&job.name).is_none_or(|&running| running < MOST_OF_ONE)
    }

    /// Whether there is a job that a helper may begin.
    fn any_ready(&self) -> bool {
        self.waiting.iter().any(|job| self.is_ready(job))
    }

    fn next(&mut self) -> Option<Job> {
        let at = self.waiting.iter().position(|job| self.is_ready(job))?;
        let job = self.waiting.remove(at)?;
        *self.running.entry(job.name).or_insert(0) += 1;
        Some(job)
    }

    fn ended(&mut self, name: u64) {
        if let Some(running) = self.running.get_mut(&name) {
            *running -= 1;
            if *running == 0 {
                self.running.remove(&name);
            }
        }
    }
}

struct JobQueue {
    jobs: Mutex<Jobs>,
    more: Condvar,
}

/// The helpers of a service, of which there may be none at the moment. Dropped, they have ended.
pub(super) struct Helpers {
    shared: Arc<ServiceState>,
    queue: Arc<JobQueue>,
    threads: Vec<JoinHandle<()>>,
}

impl Helpers {
    pub(super) fn new(shared: Arc<ServiceState>) -> Self {
        let jobs = Jobs {
            waiting: VecDeque::new(),
            running: HashMap::new(),
            threads: 0,
            idle: 0,
            ends: false,
        };
        let queue = Arc::new(JobQueue { jobs: Mutex::new(jobs), more: Condvar::new() });
        Self { shared, queue, threads: Vec::new() }
    }

    /// Gives a fault to a helper. If no thread can be started, this thread serves it.
    pub(super) fn help(&mut self, name: u64, server: &Arc<Server>, ticket: Ticket) {
        *lock(&self.shared.registry).helped.entry(name).or_insert(0) += 1;
        let job = Job { name, server: Arc::clone(server), ticket };
        let mut jobs = lock(&self.queue.jobs);
        jobs.waiting.push_back(job);
        let ready = jobs.waiting.iter().filter(|job| jobs.is_ready(job)).count();
        if ready == 0 {
            // Whoever has one of the window's jobs goes on with this one.
            return;
        }
        if ready <= jobs.idle || jobs.threads == MOST_HELPERS {
            self.queue.more.notify_one();
            return;
        }
        jobs.threads += 1;
        drop(jobs);
        let (shared, queue) = (Arc::clone(&self.shared), Arc::clone(&self.queue));
        let body = move || {
            if catch_unwind(AssertUnwindSafe(|| run(&shared, &queue))).is_err() {
                stderr_line(format_args!("a thread that serves faults panicked, which is a bug"));
                std::process::abort();
            }
        };
        self.threads.retain(|thread| !thread.is_finished());
        if let Ok(thread) = spawn_without_signals("fremap-wait", body) {
            self.threads.push(thread);
            return;
        }
        let mut jobs = lock(&self.queue.jobs);
        jobs.threads -= 1;
        let own = if jobs.threads == 0 { jobs.waiting.pop_back() } else { None };
        drop(jobs);
        if let Some(own) = own {
            end(&self.shared, own);
        }
    }

    /// Forgets what a window that is closed still had to wait for; says how much that was.
    pub(super) fn forget(&mut self, name: u64) -> usize {
        let mut jobs = lock(&self.queue.jobs);
        let before = jobs.waiting.len();
        jobs.waiting.retain(|job| job.name != name);
        before - jobs.waiting.len()
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        lock(&self.queue.jobs).ends = true;
        self.queue.more.notify_all();
        for thread in self.threads.drain(..) {
            // One that panics ends the process.
            let _ended = thread.join();
        }
    }
}

fn end(shared: &ServiceState, job: Job) {
    let Job { name, server, ticket } = job;
    let mut waiting = Vec::new();
    server.wait_and_serve(ticket, &mut waiting);
    // Who closes the window has it alone then.
    drop(server);
    let mut registry = lock(&shared.registry);
    registry.found.extend(waiting.into_iter().map(|fault| (name, fault)));
    registry.served.push(name);
    if registry.ended(name, 1) {
        shared.left.notify_all();
    }
    drop(registry);
    // What had to begin later may begin now.
    shared.waker.set();
}

fn run(shared: &ServiceState, queue: &JobQueue) {
    let mut jobs = lock(&queue.jobs);
    loop {
        if let Some(job) = jobs.next() {
            drop(jobs);
            let name = job.name;
            end(shared, job);
            jobs = lock(&queue.jobs);
            jobs.ended(name);
            continue;
        }
        jobs.idle += 1;
        let idle = |jobs: &mut Jobs| !jobs.any_ready() && !jobs.ends;
        let waited = queue.more.wait_timeout_while(jobs, IDLE, idle);
        jobs = waited.map_or_else(|poisoned| poisoned.into_inner().0, |(jobs, _)| jobs);
        jobs.idle -= 1;
        if !jobs.any_ready() {
            jobs.threads -= 1;
            return;
        }
    }
}
