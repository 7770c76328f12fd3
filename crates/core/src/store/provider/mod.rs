//! Providers: processes that compute the pages of a store, or fetch them from far away.
//!
//! A store with a [`Provider`] has no file. A program (in Python) writes its pages into memory
//! that it shares with this process. It runs in processes of its own, because no Python may run
//! in a fault. The provider starts them when they are first needed, and again when they have
//! died. Each works on one request at a time; callers get a free process in the order of their
//! arrival. A child of fork has processes of its own.

mod ahead;
mod worker;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Interrupt, Result, Said};
use crate::sys::child::{memory_to_share, Program};
use crate::sys::fork_lock::{ForkGuard, ForkLock};
use crate::sys::span::Span;
use crate::sys::{file as sys_file, futex, process};
use crate::units::{FilePage, PageSize};
use ahead::Ahead;
use worker::{Layout, Progress, Worker};

/// How long a wait may keep the caller's interrupt waiting.
const WAIT: Duration = Duration::from_millis(20);
/// How long a request that nobody waits for any more may keep others waiting.
const PATIENCE: Duration = Duration::from_secs(1);
/// Processes that are started for one request before it fails.
const MOST_STARTS: u32 = 3;
/// Pages of one request.
const MOST_BATCH_PAGES: usize = 1 << 16;

/// How pages are provided.
#[derive(Debug)]
pub struct ProviderOptions {
    /// The program, with its arguments.
    pub program: Vec<OsString>,
    /// What the program finds behind its third descriptor.
    pub payload: Vec<u8>,
    /// Processes that may run at once.
    pub workers: usize,
    /// How long one request may take.
    pub timeout: Option<Duration>,
    /// Bytes of pages that one request may ask for; a page, if that is more.
    pub batch_bytes: usize,
    /// What tells the pages' content from any other, so that processes know that they mean the
    /// same; None where nothing does.
    pub content_id: Option<Vec<u8>>,
}

/// The processes that provide the pages of a store.
#[derive(Debug)]
pub(crate) struct Provider {
    program: Program,
    payload: OwnedFd,
    layout: Layout,
    worker_limit: usize,
    timeout: Option<Duration>,
    /// A hash of what tells the content from any other.
    pub(super) content_hash: Option<u64>,
    pool: ForkLock<Pool>,
    /// Changes when a process becomes free.
    changes: AtomicU32,
    pub(super) ahead: Ahead,
}

#[derive(Debug, Default)]
struct Pool {
    /// The process that has started these; a child of fork has none of them.
    owner: u32,
    idle: Vec<Worker>,
    /// Those that somebody has taken.
    taken: usize,
    /// The numbers of those who wait, in the order of arrival.
    waiting: VecDeque<u64>,
    last_ticket: u64,
}

/// What somebody who waits is given.
enum Found {
    Idle(Worker),
    /// The right to start one.
    Vacancy,
}

impl Pool {
    /// A process for whoever is first of those who wait.
    fn claim(&mut self, ticket: u64, limit: usize) -> Option<Found> {
        if self.waiting.front() != Some(&ticket) {
            return None;
        }
        let found = self.vacant(limit)?;
        self.waiting.pop_front();
        Some(found)
    }

    fn vacant(&mut self, limit: usize) -> Option<Found> {
        self.idle.retain(|worker| !worker.is_gone());
        let free = self.idle.iter().rposition(|worker| !worker.is_busy());
        let has_room = self.idle.len() + self.taken < limit;
        let found = match free {
            Some(index) => Found::Idle(self.idle.swap_remove(index)),
            None if has_room => Found::Vacancy,
            // It is at something that nobody waits for any more.
            None => Found::Idle(self.idle.pop()?),
        };
        self.taken += 1;
        Some(found)
    }
}

/// A process that one caller has.
struct Lease<'p> {
    provider: &'p Provider,
    owner: u32,
    /// None until one is started.
    worker: Option<Worker>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        // In a child of fork a worker of the parent's is dropped, which leaves it alone.
        if self.owner == process::id() {
            let mut pool = self.provider.pool();
            pool.taken -= 1;
            pool.idle.extend(self.worker.take());
            drop(pool);
            self.provider.announce();
        }
    }
}

/// Somebody's place in the queue.
struct Ticket<'p> {
    provider: &'p Provider,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.provider.pool().waiting.retain(|&number| number != self.number);
        self.provider.announce();
    }
}

/// Pages that are asked of one process together.
struct Batch<'p> {
    lease: Lease<'p>,
    /// What the caller wants, by the position in the whole.
    first: usize,
    /// The pages, rising, each once.
    pages: Vec<u64>,
    /// For each that the caller wants its place among them, if it is not its own.
    places: Option<Vec<u32>>,
    count: usize,
    sent: bool,
    starts: u32,
}

impl<'p> Batch<'p> {
    fn new(lease: Lease<'p>, first: usize, wanted: &[FilePage]) -> Self {
        let mut pages: Vec<u64> = wanted.iter().map(|page| page.0).collect();
        let places = (!pages.is_sorted_by(|one, next| one < next)).then(|| {
            pages.sort_unstable();
            pages.dedup();
            let place = |page: &FilePage| pages.partition_point(|&other| other < page.0) as u32;
            wanted.iter().map(place).collect()
        });
        Self { lease, first, pages, places, count: wanted.len(), sent: false, starts: 0 }
    }

    fn place(&self, index: usize) -> usize {
        self.places.as_ref().map_or(index, |places| places[index] as usize)
    }
}

/// Why a batch has not come.
enum Failure {
    Stopped(Error),
    System(Errno),
    Refused(Said),
    Died(String),
    Late,
}

impl Provider {
    /// # Errors
    /// [`Error::Argument`] for numbers that are none; [`Error::Io`] without memory or descriptors.
    pub(super) fn new(options: ProviderOptions, page_size: PageSize) -> Result<Self> {
        const MOST_WORKERS: usize = 256;
        if options.workers == 0 || options.workers > MOST_WORKERS {
            return Err(Error::Argument(format!(
                "ComputedStore: workers is {}; it must be from 1 to {MOST_WORKERS}",
                options.workers
            )));
        }
        let fail = |errno| Error::system("ComputedStore", errno);
        let program = Program::new(options.program).map_err(fail)?;
        let mut payload = options.payload;
        let file = memory_to_share("fremap-payload", payload.len() as u64).map_err(fail)?;
        sys_file::write_at(file.as_fd(), Span::of(&mut payload), 0).map_err(fail)?;
        let page_bytes = page_size.bytes();
        let batch_pages = (options.batch_bytes / page_bytes).clamp(1, MOST_BATCH_PAGES);
        Ok(Self {
            program,
            payload: file,
            layout: Layout { batch_pages, page_bytes },
            worker_limit: options.workers,
            timeout: options.timeout,
            content_hash: options.content_id.as_deref().map(xxh3_64),
            pool: ForkLock::default(),
            changes: AtomicU32::new(0),
            ahead: Ahead::default(),
        })
    }

    /// The processes of this process; a child of fork drops those of its parent.
    fn pool(&self) -> ForkGuard<'_, Pool> {
        let mut pool = self.pool.lock();
        let owner = process::id();
        if pool.owner != owner {
            *pool = Pool { owner, ..Pool::default() };
        }
        pool
    }

    fn announce(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.changes);
    }

    /// Numbers of the processes that run and are not at work.
    pub(super) fn idle_processes(&self) -> Vec<i32> {
        self.pool().idle.iter().filter_map(Worker::id).collect()
    }

    /// Ends the processes that are not at work, and forgets what was provided ahead. They are
    /// started again when they are needed.
    pub(super) fn rest(&self) {
        self.ahead.forget();
        let idle = std::mem::take(&mut self.pool().idle);
        drop(idle);
        self.announce();
    }

    fn lease(&self, found: Found) -> Lease<'_> {
        let worker = match found {
            Found::Idle(worker) => Some(worker),
            Found::Vacancy => None,
        };
        Lease { provider: self, owner: process::id(), worker }
    }

    /// Waits for a process.
    fn take(&self, interrupt: &dyn Interrupt) -> Result<Lease<'_>> {
        let number = {
            let mut pool = self.pool();
            pool.last_ticket += 1;
            let number = pool.last_ticket;
            pool.waiting.push_back(number);
            number
        };
        let ticket = Ticket { provider: self, number };
        loop {
            let seen = self.changes.load(Ordering::Acquire);
            let found = self.pool().claim(ticket.number, self.worker_limit);
            if let Some(found) = found {
                return Ok(self.lease(found));
            }
            let _woken = futex::wait(&self.changes, seen, WAIT);
            interrupt.check()?;
        }
    }

    /// A process, if one is free and nobody waits for it.
    fn try_take(&self) -> Option<Lease<'_>> {
        let mut pool = self.pool();
        let found = if pool.waiting.is_empty() { pool.vacant(self.worker_limit) } else { None };
        drop(pool);
        found.map(|found| self.lease(found))
    }

    /// Provides pages: `take` is given the content of each, by its position. They are asked
    /// for in batches, as many at once as there are processes, and come in order.
    ///
    /// It may copy that to a window, but not to one of this store: the thread that
    /// brings its pages may wait for the process that this one has. Nobody can ask for that, as
    /// nobody may write to such a window.
    ///
    /// # Errors
    /// [`Error::Provider`] and [`Error::Interrupted`], with the number of pages that have come.
    fn read(
        &self,
        wanted: &[FilePage],
        take: &mut dyn FnMut(usize, Span<'_>),
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let batch_pages =
            wanted.len().div_ceil(self.worker_limit).clamp(1, self.layout.batch_pages);
        let mut under_way: VecDeque<Batch<'_>> = VecDeque::new();
        let (mut next, mut done) = (0, 0);
        while done < wanted.len() {
            while next < wanted.len() && under_way.len() < self.worker_limit {
                let lease = if under_way.is_empty() {
                    self.take(interrupt).map_err(|error| error.with_completed(done))?
                } else if let Some(lease) = self.try_take() {
                    lease
                } else {
                    break;
                };
                let end = wanted.len().min(next + batch_pages);
                let mut batch = Batch::new(lease, next, &wanted[next..end]);
                // What goes wrong here is told when it is the batch's turn.
                let _begun = self.begin(&mut batch);
                under_way.push_back(batch);
                next = end;
            }
            let Some(mut batch) = under_way.pop_front() else { break };
            self.finish(&mut batch, interrupt).map_err(|failure| {
                let page = batch.pages.first().copied();
                self.failed(failure, page, batch.pages.len()).with_completed(done)
            })?;
            if let Some(worker) = &batch.lease.worker {
                for index in 0..batch.count {
                    take(batch.first + index, worker.content(batch.place(index)));
                }
            }
            done += batch.count;
        }
        Ok(())
    }

    /// Sends the request of a batch if its process can take it.
    fn begin(&self, batch: &mut Batch<'_>) -> Result<(), Failure> {
        let worker = match &mut batch.lease.worker {
            Some(worker) => worker,
            empty => {
                batch.starts += 1;
                let started = Worker::start(&self.program, &self.payload, self.layout);
                empty.insert(started.map_err(Failure::System)?)
            }
        };
        if !batch.sent && !worker.is_busy() {
            batch.sent = worker.ask(&batch.pages).map_err(Failure::System)?;
            if !batch.sent {
                // It has ended since it was last needed.
                batch.lease.worker = None;
            }
        }
        Ok(())
    }

    /// Waits for what a batch asks for. Starts its process again if that ends meanwhile.
    fn finish(&self, batch: &mut Batch<'_>, interrupt: &dyn Interrupt) -> Result<(), Failure> {
        loop {
            self.begin(batch)?;
            let Some(worker) = &mut batch.lease.worker else {
                if batch.starts >= MOST_STARTS {
                    return Err(Failure::Died("does not stay".to_owned()));
                }
                continue;
            };
            let limit = if batch.sent { self.timeout } else { Some(PATIENCE) };
            match worker.look(limit, WAIT) {
                Progress::Done if batch.sent => return Ok(()),
                Progress::Refused(said) if batch.sent => return Err(Failure::Refused(said)),
                // What has ended is the request before, which nobody waits for.
                Progress::UnderWay | Progress::Done | Progress::Refused(_) => {}
                Progress::Ended(ended) => {
                    batch.lease.worker = None;
                    batch.sent = false;
                    if batch.starts >= MOST_STARTS {
                        return Err(Failure::Died(ended.to_string()));
                    }
                }
                Progress::Late => {
                    let late = batch.sent;
                    batch.sent = false;
                    if let Some(worker) = batch.lease.worker.take() {
                        worker.kill();
                    }
                    if late || batch.starts >= MOST_STARTS {
                        return Err(Failure::Late);
                    }
                }
            }
            interrupt.check().map_err(Failure::Stopped)?;
        }
    }

    fn failed(&self, failure: Failure, page: Option<u64>, count: usize) -> Error {
        let said = |errno, reason| {
            let (traceback, pickled) = (String::new(), Vec::new());
            Said { errno, reason, traceback, pickled }
        };
        let said = match failure {
            Failure::Stopped(error) => return error,
            Failure::Refused(said) => said,
            Failure::System(errno) => said(
                errno,
                format!("no provider process can be started: {}", crate::error::describe(errno)),
            ),
            Failure::Died(how) => {
                said(Errno::IO, format!("the provider process {how}, {MOST_STARTS} times in a row"))
            }
            Failure::Late => said(
                Errno::TIMEDOUT,
                match self.timeout {
                    Some(limit) => format!(
                        "the provider process has not answered within {} s and was ended; give \
                         a longer timeout=",
                        limit.as_secs_f64()
                    ),
                    None => "the provider process does not start".to_owned(),
                },
            ),
        };
        Error::Provider {
            operation: "read",
            file_page: page,
            page_count: count,
            said: Box::new(said),
            path: None,
            completed: 0,
        }
    }
}
