//! Addresses that stay empty in children of `fork`.
//!
//! Memory with `MADV_DONTFORK` is a hole in a child's address space, and the next
//! thing that the child allocates may land in it, under whatever pointers the
//! child has from its parent. So the addresses of such memory are listed here, and
//! the child maps `PROT_NONE` over each before `fork` returns there: a touch is
//! SIGSEGV, and nothing else can be at that address.
//!
//! The handler runs in a child of a process with threads, where any lock may be
//! held for ever and the allocator may not be used. So the list has no lock, its
//! places are never freed, and the handler does nothing but raw system calls. A
//! child made by `clone(2)` itself, or by `_Fork`, runs no handlers and keeps the hole.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use rustix::io::Errno;

/// `MAP_FIXED_NOREPLACE` (Linux 4.17); before, the address is a wish.
const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;

/// One range, or none while `len` is 0.
#[derive(Debug)]
struct Place {
    taken: AtomicBool,
    start: AtomicPtr<c_void>,
    len: AtomicUsize,
    next: AtomicPtr<Place>,
}

/// A list that only grows; places that are no longer needed are taken again.
#[derive(Debug)]
struct Places(AtomicPtr<Place>);

static PLACES: Places = Places::new();

impl Places {
    const fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    fn iter(&self) -> impl Iterator<Item = &'static Place> {
        let follow = |link: &AtomicPtr<Place>| {
            // SAFETY: null, or a place that `take` has leaked.
            unsafe { link.load(Ordering::Acquire).as_ref::<'static>() }
        };
        std::iter::successors(follow(&self.0), move |place| follow(&place.next))
    }

    /// A place for one range, of those that are free, or a new one.
    fn take(&self, start: *mut c_void, len: usize) -> &'static Place {
        let free = |place: &&Place| !place.taken.swap(true, Ordering::Acquire);
        let place = self.iter().find(free).unwrap_or_else(|| self.add());
        place.start.store(start, Ordering::Relaxed);
        // Last: a child that is forked here sees no range, or this one.
        place.len.store(len, Ordering::Release);
        place
    }

    fn add(&self) -> &'static Place {
        let place: &'static Place = Box::leak(Box::new(Place {
            taken: AtomicBool::new(true),
            start: AtomicPtr::new(null_mut()),
            len: AtomicUsize::new(0),
            next: AtomicPtr::new(null_mut()),
        }));
        let link = |first: *mut Place| {
            place.next.store(first, Ordering::Relaxed);
            Some(std::ptr::from_ref(place).cast_mut())
        };
        // Never ends without success, as `link` refuses nothing.
        let _linked = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, link);
        place
    }
}

impl Place {
    /// Nothing is to be kept any more.
    fn free(&self) {
        self.len.store(0, Ordering::Relaxed);
        self.taken.store(false, Ordering::Release);
    }

    /// Puts memory that nobody may touch where a child has nothing.
    fn fill_hole(&self) {
        let len = self.len.load(Ordering::Acquire);
        if len == 0 {
            return;
        }
        let start = self.start.load(Ordering::Relaxed);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: nothing that is mapped is replaced: the kernel says EEXIST (the
        // parent had not given its advice yet, or mapped something else since), or
        // before 4.17 it maps elsewhere, and that is unmapped again.
        unsafe {
            let flags = flags | MAP_FIXED_NOREPLACE;
            let mapped = libc::mmap(start, len, libc::PROT_NONE, flags, -1, 0);
            if mapped != libc::MAP_FAILED && mapped != start {
                libc::munmap(mapped, len);
            }
        }
    }
}

extern "C" fn fill_holes() {
    PLACES.iter().for_each(Place::fill_hole);
}

/// Has children call [`fill_holes`].
fn register() -> Result<(), Errno> {
    // Not a `Once`: a child that is forked while another thread is in it would
    // wait for ever. Registered twice, the handler finds nothing to do the second time.
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if REGISTERED.load(Ordering::Acquire) {
        return Ok(());
    }
    // SAFETY: the handler does what may be done between fork and exec, and this
    // library is never unloaded.
    match unsafe { libc::pthread_atfork(None, None, Some(fill_holes)) } {
        0 => {
            REGISTERED.store(true, Ordering::Release);
            Ok(())
        }
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// A range that stays empty in children, as long as this lives.
#[derive(Debug)]
pub(super) struct Kept {
    place: &'static Place,
    owner: u32,
}

impl Kept {
    /// Keeps a range that the caller is about to give `MADV_DONTFORK`.
    ///
    /// # Errors
    /// ENOMEM when the handler cannot be registered.
    pub(super) fn new(start: *mut c_void, len: usize) -> Result<Self, Errno> {
        register()?;
        Ok(Self { place: PLACES.take(start, len), owner: std::process::id() })
    }

    /// Whether this process has the memory, and not the empty range.
    pub(super) fn is_own(&self) -> bool {
        self.owner == std::process::id()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // In a child the range stays as it is, for those who still point into it,
        // and its own children inherit it like any mapping.
        if self.is_own() {
            self.place.free();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again() {
        static LIST: Places = Places::new();
        let address = |number: usize| std::ptr::without_provenance_mut(number << 12);
        let places: Vec<_> = (1..=3).map(|number| LIST.take(address(number), number)).collect();
        assert_eq!(LIST.iter().count(), 3);
        places[1].free();
        let again = LIST.take(address(9), 9);
        assert!(std::ptr::eq(again, places[1]));
        assert_eq!(LIST.iter().count(), 3);
        let mut lens: Vec<_> = LIST.iter().map(|place| place.len.load(Ordering::Relaxed)).collect();
        lens.sort_unstable();
        assert_eq!(lens, [1, 3, 9]);
    }

    #[test]
    fn threads_get_places_of_their_own() {
        static LIST: Places = Places::new();
        std::thread::scope(|scope| {
            for thread in 1..=4_usize {
                scope.spawn(move || {
                    for _ in 0..1000 {
                        let start = std::ptr::without_provenance_mut(thread << 12);
                        let place = LIST.take(start, thread);
                        assert_eq!(place.start.load(Ordering::Relaxed), start);
                        assert_eq!(place.len.load(Ordering::Relaxed), thread);
                        place.free();
                    }
                });
            }
        });
        // A place that is freed while another thread looks past it is not found.
        assert!((1..=8).contains(&LIST.iter().count()));
    }
}
