//! Pages that were requested from a provider before they are read, and kept until then.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use super::{Provider, WAIT};
use crate::error::{Interrupt, Result, Uninterruptible};
use crate::room::room_for;
use crate::sys::fork_lock::{ForkGuard, ForkLock};
use crate::sys::span::Span;
use crate::sys::thread::spawn_without_signals;
use crate::sys::{futex, process};
use crate::units::FilePage;

/// Bytes of pages that are kept for a store.
const KEPT_BYTES: usize = 64 << 20;
/// Threads that wait for a store's processes, no matter how many these are.
const MOST_THREADS: usize = 8;

/// What was provided ahead, and what will be.
#[derive(Debug, Default)]
pub(in crate::store) struct Ahead {
    pages: ForkLock<Pages>,
    /// Changes when pages have come, or will not.
    arrivals: AtomicU32,
}

#[derive(Debug, Default)]
struct Pages {
    /// The process that has these; a child of fork has none of its parent's threads.
    owner: u32,
    kept: HashMap<u64, Box<[u8]>>,
    /// Those that are kept, and some that were, in the order of arrival.
    order: VecDeque<u64>,
    /// Those that a thread brings, or will bring.
    under_way: HashSet<u64>,
    waiting: VecDeque<Vec<FilePage>>,
    threads: usize,
    /// How often all was forgotten: what was asked for before that is not kept.
    forgotten: u64,
}

impl Pages {
    /// Keeps a page, unless nobody wants it any more; the oldest ones go for it.
    fn keep(&mut self, page: u64, content: Box<[u8]>, most: usize) {
        if !self.under_way.remove(&page) {
            return;
        }
        while self.kept.len() >= most {
            let Some(oldest) = self.order.pop_front() else { break };
            self.kept.remove(&oldest);
        }
        self.kept.insert(page, content);
        self.order.push_back(page);
        if self.order.len() > 2 * most {
            self.order.retain(|page| self.kept.contains_key(page));
        }
    }
}

impl Ahead {
    fn pages(&self) -> ForkGuard<'_, Pages> {
        let mut pages = self.pages.lock();
        let owner = process::id();
        if pages.owner != owner {
            *pages = Pages { owner, ..Pages::default() };
        }
        pages
    }

    fn announce(&self) {
        self.arrivals.fetch_add(1, Ordering::Release);
        futex::wake_all(&self.arrivals);
    }

    /// Whether a page was provided ahead and not read yet.
    pub(in crate::store) fn has(&self, page: FilePage) -> bool {
        self.pages().kept.contains_key(&page.0)
    }

    /// Forgets everything, also what is under way.
    pub(in crate::store) fn forget(&self) {
        let mut pages = self.pages();
        let Pages { owner, threads, forgotten, .. } = *pages;
        *pages = Pages { owner, threads, forgotten: forgotten + 1, ..Pages::default() };
        drop(pages);
        self.announce();
    }

    /// A page that was provided ahead, which is waited for if it is under way; None for one that
    /// has to be asked for.
    fn take(&self, page: FilePage, interrupt: &dyn Interrupt) -> Result<Option<Box<[u8]>>> {
        loop {
            let seen = self.arrivals.load(Ordering::Acquire);
            let mut pages = self.pages();
            if let Some(content) = pages.kept.remove(&page.0) {
                return Ok(Some(content));
            }
            if !pages.under_way.contains(&page.0) {
                return Ok(None);
            }
            drop(pages);
            let _woken = futex::wait(&self.arrivals, seen, WAIT);
            interrupt.check()?;
        }
    }

    fn is_empty(&self) -> bool {
        let pages = self.pages();
        pages.kept.is_empty() && pages.under_way.is_empty()
    }
}

impl Provider {
    fn most_kept(&self) -> usize {
        (KEPT_BYTES / self.layout.page_bytes).max(1)
    }

    /// Has threads bring pages, as many as are kept. A hint: where no thread can be had it is
    /// dropped.
    pub(in crate::store) fn provide_ahead(self: &Arc<Self>, runs: &[Range<u64>]) {
        let mut pages = self.ahead.pages();
        let named = runs.iter().cloned().flatten().take(self.most_kept());
        let wanted: Vec<FilePage> = named
            .filter(|page| !pages.kept.contains_key(page) && !pages.under_way.contains(page))
            .map(FilePage)
            .collect();
        pages.under_way.extend(wanted.iter().map(|page| page.0));
        let each = wanted.len().div_ceil(self.worker_limit).clamp(1, self.layout.batch_pages);
        pages.waiting.extend(wanted.chunks(each).map(<[FilePage]>::to_vec));
        let most = self.worker_limit.min(MOST_THREADS).min(pages.waiting.len());
        while pages.threads < most {
            let provider = Arc::downgrade(self);
            let bring = move || bring(&provider);
            if spawn_without_signals("fremap-provide", bring).is_err() {
                break;
            }
            pages.threads += 1;
        }
        if pages.threads == 0 {
            pages.waiting.clear();
            pages.under_way.clear();
        }
    }

    /// Pages as [`read`](Self::read) brings them, those first that were provided ahead.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(in crate::store) fn provide(
        &self,
        wanted: &[FilePage],
        take: &mut dyn FnMut(usize, Span<'_>),
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        if self.ahead.is_empty() {
            return self.read(wanted, take, interrupt);
        }
        let mut missing = Vec::new();
        for (position, &page) in wanted.iter().enumerate() {
            match self.ahead.take(page, interrupt)? {
                Some(mut content) => take(position, Span::of(&mut content)),
                None => missing.push(position),
            }
        }
        let pages: Vec<FilePage> = missing.iter().map(|&position| wanted[position]).collect();
        let mut take = |index: usize, content: Span<'_>| take(missing[index], content);
        self.read(&pages, &mut take, interrupt).map_err(|error| {
            let front = missing.get(error.completed()).copied().unwrap_or(wanted.len());
            error.with_completed(front)
        })
    }
}

/// What a thread does: one batch after another, until none waits or the store is gone.
fn bring(provider: &Weak<Provider>) {
    loop {
        let Some(provider) = provider.upgrade() else { return };
        let (next, forgotten) = {
            let mut pages = provider.ahead.pages();
            let next = pages.waiting.pop_front();
            pages.threads -= usize::from(next.is_none());
            (next, pages.forgotten)
        };
        let Some(wanted) = next else { return };
        let page_bytes = provider.layout.page_bytes;
        // Who wants pages that could not be had asks for them, and is told why.
        let (mut content, mut done) = (Vec::new(), 0);
        if let Ok(room) = room_for::<u8>("prefetch", wanted.len() * page_bytes) {
            content = room;
            content.resize(wanted.len() * page_bytes, 0);
            let whole = Span::of(&mut content);
            let mut take = |position: usize, content: Span<'_>| {
                whole.part(position * page_bytes, page_bytes).copy_span(content);
            };
            let outcome = provider.read(&wanted, &mut take, &Uninterruptible);
            done = outcome.map_or_else(|error| error.completed(), |()| wanted.len());
        }
        let mut pages = provider.ahead.pages();
        if pages.forgotten != forgotten {
            continue;
        }
        for (page, content) in wanted.iter().zip(content.chunks(page_bytes)).take(done) {
            pages.keep(page.0, content.into(), provider.most_kept());
        }
        for page in &wanted[done..] {
            pages.under_way.remove(&page.0);
        }
        drop(pages);
        provider.ahead.announce();
    }
}
