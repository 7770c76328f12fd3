//! Ranges of memory whose faults have a resolver, or an explanation. Children of `fork` do not
//! inherit ranges that have a resolver.
//!
//! Signal handlers read these lists, also in children of a process with threads, where any lock may
//! be held forever and the allocator must not be used. So the lists have no lock, and their entries
//! are never freed.

use std::ffi::c_void;
use std::fmt;
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use super::call::check;
use super::fork;
use super::span::Span;

/// A touch of memory that faulted.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    /// Where.
    pub address: usize,
    /// Whether it is a write.
    pub stores: bool,
}

/// The outcome of a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// It is tried again.
    Again,
    /// It is the SIGBUS that it was.
    Bus,
    /// It is SIGSEGV: the page may only be read.
    Segv,
}

/// Resolves the faults of a range, in the thread that faults.
///
/// What it does in a signal handler allocates nothing, takes no lock but a
/// [`Lock`](super::lock::Lock) that is held without signals, and never panics.
pub trait Resolve: Send + Sync + fmt::Debug {
    /// In a signal handler: ends a fault of this process.
    fn resolve(&self, touch: Touch) -> Touched;

    /// In a signal handler of a child of fork, where the range is empty memory under the
    /// userfaultfd `uffd` of the child's own.
    fn resolve_in_child(&self, touch: Touch, uffd: RawFd) -> Touched;

    /// Before a fork: takes what a child has to find at rest.
    fn before_fork(&self);

    /// After it, in the parent and in the child: lets go of that.
    fn after_fork(&self);
}

/// Says why a touch of a range raised SIGBUS, which the kernel does not say.
pub trait Explain: Send + Sync + fmt::Debug {
    /// In a signal handler: writes a line to stderr. Allocates nothing, waits for no lock, and
    /// never panics.
    fn explain(&self, touch: Touch);
}

/// One range, or none while `len` is 0, and who is asked about it.
#[derive(Debug)]
pub(super) struct FaultRange<R: ?Sized + 'static = dyn Resolve> {
    taken: AtomicBool,
    start: AtomicPtr<c_void>,
    len: AtomicUsize,
    /// A box of its own, or null.
    resolver: AtomicPtr<Arc<R>>,
    /// Who is looking at `resolver`.
    callers: AtomicUsize,
    /// The userfaultfd that a child of fork has for the range, or -1.
    child_uffd: AtomicI32,
    next: AtomicPtr<FaultRange<R>>,
}

/// A list that only grows; entries of ranges that are gone are used again.
#[derive(Debug)]
pub(super) struct FaultRanges<R: ?Sized + 'static = dyn Resolve> {
    first: AtomicPtr<FaultRange<R>>,
    /// Entries that are free, or become so: there may be thousands of others to look through.
    free: AtomicUsize,
}

/// What children of `fork` do not inherit.
pub(super) static FAULT_RANGES: FaultRanges = FaultRanges::new();
/// What the kernel resolves the faults of.
pub(super) static EXPLAINED: FaultRanges<dyn Explain> = FaultRanges::new();

impl<R: ?Sized + 'static> FaultRanges<R> {
    const fn new() -> Self {
        Self { first: AtomicPtr::new(null_mut()), free: AtomicUsize::new(0) }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &'static FaultRange<R>> {
        let follow = |link: &AtomicPtr<FaultRange<R>>| {
            // SAFETY: null, or a range that `take` has leaked.
            unsafe { link.load(Ordering::Acquire).as_ref::<'static>() }
        };
        std::iter::successors(follow(&self.first), move |range| follow(&range.next))
    }

    /// Lists a range, in an entry that is free or a new one.
    pub(super) fn take(&self, start: *mut c_void, len: usize) -> &'static FaultRange<R> {
        let free = |range: &&FaultRange<R>| !range.taken.swap(true, Ordering::Acquire);
        let some = self.free.load(Ordering::Acquire) > 0;
        let found = some.then(|| self.iter().find(free)).flatten();
        if found.is_some() {
            self.free.fetch_sub(1, Ordering::Relaxed);
        }
        let range = found.unwrap_or_else(|| self.add());
        range.start.store(start, Ordering::Relaxed);
        // Last: a child that is forked here sees no range, or this one.
        range.len.store(len, Ordering::Release);
        range
    }

    /// Nothing is to be kept any more.
    pub(super) fn free(&self, range: &FaultRange<R>) {
        range.len.store(0, Ordering::Relaxed);
        // First, so that whoever finds the entry has it to take away.
        self.free.fetch_add(1, Ordering::Relaxed);
        range.taken.store(false, Ordering::Release);
    }

    fn add(&self) -> &'static FaultRange<R> {
        let range: &'static FaultRange<R> = Box::leak(Box::new(FaultRange {
            taken: AtomicBool::new(true),
            start: AtomicPtr::new(null_mut()),
            len: AtomicUsize::new(0),
            resolver: AtomicPtr::new(null_mut()),
            callers: AtomicUsize::new(0),
            child_uffd: AtomicI32::new(-1),
            next: AtomicPtr::new(null_mut()),
        }));
        let link = |first: *mut FaultRange<R>| {
            range.next.store(first, Ordering::Relaxed);
            Some(std::ptr::from_ref(range).cast_mut())
        };
        // Never ends without success, as `link` refuses nothing.
        let _linked = self.first.fetch_update(Ordering::AcqRel, Ordering::Acquire, link);
        range
    }
}

impl<R: ?Sized + 'static> FaultRange<R> {
    /// The range, where there is one.
    pub(super) fn range(&self) -> Option<(*mut c_void, usize)> {
        let len = self.len.load(Ordering::Acquire);
        (len > 0).then(|| (self.start.load(Ordering::Relaxed), len))
    }

    fn contains(&self, address: usize) -> bool {
        self.range().is_some_and(|(start, len)| address.wrapping_sub(start.addr()) < len)
    }

    /// In a child of fork, whose only thread this is: what its parent had is not its own.
    pub(super) fn begin_child(&self) {
        self.callers.store(0, Ordering::Relaxed);
        self.close_child_uffd();
    }

    fn close_child_uffd(&self) {
        let uffd = self.child_uffd.swap(-1, Ordering::Relaxed);
        if uffd >= 0 {
            // SAFETY: a descriptor that is this range's alone, and is not used again.
            unsafe { libc::close(uffd) };
        }
    }

    /// Denies all access to the range.
    fn forbid(&self) -> Result<(), Errno> {
        let Some((start, len)) = self.range() else { return Ok(()) };
        // SAFETY: a range that this child has mapped for nothing but to be read here.
        check(unsafe { libc::mprotect(start, len, libc::PROT_NONE) })
    }

    /// Has a child of fork know its userfaultfd for the range.
    pub(super) fn set_child_uffd(&self, uffd: RawFd) {
        self.child_uffd.store(uffd, Ordering::Release);
    }

    /// Whether this is a child that has the range, empty, to be read.
    pub(super) fn is_in_child(&self) -> bool {
        self.child_uffd.load(Ordering::Acquire) >= 0
    }

    /// Calls `body` with the resolver of this range, which is not dropped meanwhile.
    pub(super) fn with_resolver<T>(&self, body: impl FnOnce(&R) -> T) -> Option<T> {
        self.callers.fetch_add(1, Ordering::SeqCst);
        // SAFETY: a box that is freed when nobody has come to look at it since it was
        // taken out, and this thread has come before.
        let resolver = unsafe { self.resolver.load(Ordering::SeqCst).as_ref() };
        let result = resolver.map(|resolver| body(resolver.as_ref()));
        self.callers.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Drops who was asked about the range, and is not any more, when nobody asks.
    fn retire(&self, boxed: *mut Arc<R>) {
        while self.callers.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        // SAFETY: made by `Resolving` or `Explaining`, taken out once, and nobody looks at it
        // any more.
        drop(unsafe { Box::from_raw(boxed) });
    }
}

/// Whether any of `span` lies in such a range, as the memory of every paged window does.
pub(crate) fn has_part_of(span: Span<'_>) -> bool {
    let (first, end) = (span.start().addr(), span.start().addr() + span.len());
    FAULT_RANGES.iter().filter_map(FaultRange::range).any(|(start, len)| {
        let start = start.addr();
        start < end && first < start + len
    })
}

/// Ends the fault of a touch, in a signal handler; None if it is in nobody's range.
pub(super) fn resolve(touch: Touch) -> Option<Touched> {
    let range = FAULT_RANGES.iter().find(|range| range.contains(touch.address))?;
    let child_uffd = range.child_uffd.load(Ordering::Acquire);
    range.with_resolver(|resolver| match child_uffd {
        ..0 => resolver.resolve(touch),
        uffd => resolver.resolve_in_child(touch, uffd),
    })
}

/// The right to resolve the faults of a range, as long as this lives.
#[derive(Debug)]
pub struct Resolving {
    range: &'static FaultRange,
}

impl Resolving {
    pub(super) fn new(range: &'static FaultRange, resolver: Arc<dyn Resolve>) -> Self {
        let boxed = Box::into_raw(Box::new(resolver));
        let _no_fork = fork::exclude();
        range.child_uffd.store(-1, Ordering::Relaxed);
        range.resolver.store(boxed, Ordering::SeqCst);
        Self { range }
    }
}

impl Drop for Resolving {
    fn drop(&mut self) {
        let no_fork = fork::exclude();
        let boxed = self.range.resolver.swap(null_mut(), Ordering::SeqCst);
        drop(no_fork);
        if self.range.is_in_child() {
            // The range stays, so that nothing else comes there. Without a userfaultfd it
            // would read as zeros: from now on it cannot be read at all.
            if self.range.forbid().is_ok() {
                self.range.close_child_uffd();
            }
        }
        self.range.retire(boxed);
    }
}

/// Says why a touch is SIGBUS, in a signal handler, if it is in a range that somebody explains.
pub(super) fn explain(touch: Touch) {
    let range = EXPLAINED.iter().find(|range| range.contains(touch.address));
    let _told = range.and_then(|range| range.with_resolver(|explainer| explainer.explain(touch)));
}

/// The right to explain the faults of a range, as long as this lives.
#[derive(Debug)]
pub struct Explaining {
    range: &'static FaultRange<dyn Explain>,
}

impl Explaining {
    pub(super) fn new(start: *mut c_void, len: usize, explainer: Arc<dyn Explain>) -> Self {
        let range = EXPLAINED.take(start, len);
        range.resolver.store(Box::into_raw(Box::new(explainer)), Ordering::SeqCst);
        Self { range }
    }
}

impl Drop for Explaining {
    fn drop(&mut self) {
        self.range.retire(self.range.resolver.swap(null_mut(), Ordering::SeqCst));
        EXPLAINED.free(self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again() {
        static LIST: FaultRanges = FaultRanges::new();
        let address = |number: usize| std::ptr::without_provenance_mut(number << 12);
        let ranges: Vec<_> = (1..=3).map(|number| LIST.take(address(number), number)).collect();
        assert_eq!(LIST.iter().count(), 3);
        LIST.free(ranges[1]);
        let again = LIST.take(address(9), 9);
        assert!(std::ptr::eq(again, ranges[1]));
        assert_eq!(LIST.iter().count(), 3);
        let mut lens: Vec<_> = LIST.iter().map(|range| range.len.load(Ordering::Relaxed)).collect();
        lens.sort_unstable();
        assert_eq!(lens, [1, 3, 9]);
    }

    #[test]
    fn threads_get_places_of_their_own() {
        static LIST: FaultRanges = FaultRanges::new();
        std::thread::scope(|scope| {
            for thread in 1..=4_usize {
                scope.spawn(move || {
                    for _ in 0..1000 {
                        let start = std::ptr::without_provenance_mut(thread << 12);
                        let range = LIST.take(start, thread);
                        assert_eq!(range.start.load(Ordering::Relaxed), start);
                        assert_eq!(range.len.load(Ordering::Relaxed), thread);
                        LIST.free(range);
                    }
                });
            }
        });
        // A range that is freed while another thread looks past it is not found.
        assert!((1..=8).contains(&LIST.iter().count()));
    }
}
