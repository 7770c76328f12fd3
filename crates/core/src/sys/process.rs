//! Which process this is, without a system call.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use super::span::system_page_bytes;

/// A page that is zeros in every child with memory of its own (`MADV_WIPEONFORK`, Linux 4.14),
/// also in one of a bare `clone(2)`, which runs no handlers. Null before it is first needed.
static WIPED: AtomicPtr<AtomicU32> = AtomicPtr::new(null_mut());
/// There can be no such page: every caller asks the kernel.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// The number of this process.
#[must_use]
pub fn id() -> u32 {
    let page = WIPED.load(Ordering::Acquire);
    // SAFETY: null, or the start of a page that `map` has mapped and nobody unmaps.
    let Some(known) = (unsafe { page.as_ref() }) else {
        if !REFUSED.load(Ordering::Relaxed) {
            map();
        }
        return std::process::id();
    };
    match known.load(Ordering::Relaxed) {
        // This process is a child that has not asked before, or the first that asks.
        0 => loop {
            let id = std::process::id();
            known.store(id, Ordering::Relaxed);
            // A signal handler may have forked in between: a child asks again.
            if std::process::id() == id {
                return id;
            }
        },
        id => id,
    }
}

/// Maps the page.
fn map() {
    let len = system_page_bytes();
    // SAFETY: no address is given, so nothing is replaced; what is unmapped again was mapped
    // here and shown to nobody.
    unsafe {
        let (access, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = libc::mmap(null_mut(), len, access, flags, -1, 0);
        if page == libc::MAP_FAILED {
            REFUSED.store(true, Ordering::Relaxed);
            return;
        }
        let wiped = libc::madvise(page, len, libc::MADV_WIPEONFORK) == 0;
        REFUSED.fetch_or(!wiped, Ordering::Relaxed);
        let published = wiped
            && WIPED
                .compare_exchange(null_mut(), page.cast(), Ordering::AcqRel, Ordering::Relaxed)
                .is_ok();
        if !published {
            libc::munmap(page, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::forked::{in_child, End};
    use super::*;

    #[test]
    fn a_process_and_its_child_each_have_their_number() {
        assert_eq!([id(), id()], [std::process::id(); 2]);
        let right = || id() == std::process::id() && id() == std::process::id();
        assert_eq!(in_child(|| right().into()), End::Exit(1));
        assert_eq!(id(), std::process::id());
    }
}
