//! What children of `fork` find where a paged window is in their parent: what it shows, as
//! the store has it, and never anything else. Children here allocate nothing, as they are
//! forked from a process with threads.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{numbered, open, options, remap, shown, LAZY, NOW, PAGE};
use fremap_core::error::Uninterruptible;
use fremap_core::units::{Prot, Selection};
use fremap_core::window::{EngineKind, Mapping, Window, WindowOptions};

const PAGES: usize = 2048;
const LAST: i64 = 2047;

/// Runs `body` in a child; its exit code, or the negated signal that it died of.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child runs `body`, which does what a child of threads may, and ends.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            libc::_exit(body());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        if libc::WIFSIGNALED(status) {
            -libc::WTERMSIG(status)
        } else {
            libc::WEXITSTATUS(status)
        }
    }
}

/// The first word of a window page.
#[expect(clippy::cast_ptr_alignment, reason = "pages are aligned")]
fn word(window: &Window, page: usize) -> u64 {
    // SAFETY: within the window, and aligned.
    unsafe { window.memory().start().wrapping_add(page * PAGE).cast::<u64>().read_volatile() }
}

/// 0 if a window page shows what it should.
fn wrong(window: &Window, page: usize, expected: u64) -> i32 {
    i32::from(word(window, page) != expected)
}

/// Maps memory of the child's own many times over; 1 if any lies in the window.
fn map_much(window: &Window) -> i32 {
    const BYTES: usize = 1 << 20;
    let begin = window.memory().start().addr();
    let end = begin + window.memory().len();
    for _ in 0..400 {
        // SAFETY: no address is given, so nothing is replaced.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), BYTES, libc::PROT_READ, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return 2;
        }
        if start.addr() < end && start.addr() + BYTES > begin {
            return 1;
        }
    }
    0
}

#[test]
fn a_child_sees_what_the_window_shows_whether_it_was_present_or_not() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    remap(&window, &[7, 8, 9], 3, NOW);
    let all = || {
        let scattered = wrong(&window, 3, 8) + wrong(&window, 5, 10) + wrong(&window, 0, 1);
        let forwards = (6..PAGES).map(|page| wrong(&window, page, page as u64 + 1));
        scattered + forwards.sum::<i32>()
    };
    assert_eq!(in_child(all), 0);
    assert_eq!(shown(&window, 0..8), [1, 2, 3, 8, 9, 10, 7, 8]);
}

#[test]
fn a_child_cannot_store() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    let stores = || {
        let page = window.memory().start();
        wrong(&window, 0, 1);
        // SAFETY: within the window; that the store is a signal is the point.
        unsafe { page.write_volatile(1) };
        0
    };
    assert_eq!(in_child(stores), -libc::SIGSEGV);
}

#[test]
fn what_nobody_maps_or_may_touch_is_a_signal() {
    let store = numbered(PAGES as u64);
    let window =
        open(&store, &WindowOptions { mapping: Mapping::None, ..options(EngineKind::Paged) });
    remap(&window, &[7, 8], 0, NOW);
    window.protect(&Selection::List(vec![1]), Prot::None, &Uninterruptible).unwrap();
    for page in [1, 2] {
        assert_eq!(in_child(|| wrong(&window, page, 0)), -libc::SIGBUS, "page {page}");
    }
    assert_eq!(in_child(|| wrong(&window, 0, 8)), 0);
}

#[test]
fn nothing_that_a_child_allocates_lands_in_the_window() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    remap(&window, &(0..=LAST).rev().collect::<Vec<_>>(), 0, NOW);
    assert_eq!(in_child(|| map_much(&window)), 0);
    let after_all_that = || map_much(&window) + wrong(&window, 5, PAGES as u64 - 5);
    assert_eq!(in_child(after_all_that), 0);
}

#[test]
fn a_child_of_a_child_sees_the_same() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    let allocates = || in_child(|| map_much(&window));
    assert_eq!(in_child(allocates), 0);
    let touches = || {
        // What the first child has brought is not the second one's.
        let first = wrong(&window, 1, 2);
        first + in_child(|| wrong(&window, 1, 2) + wrong(&window, 1000, 1001))
    };
    assert_eq!(in_child(touches), 0);
}

#[test]
fn threads_of_a_child_touch_at_once() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    let threads = || {
        let every = |first: usize| {
            (first..PAGES).step_by(2).map(|page| wrong(&window, page, page as u64 + 1)).sum()
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| every(0));
            let own: i32 = every(1);
            own + other.join().unwrap_or(99)
        })
    };
    assert_eq!(in_child(threads), 0);
}

#[test]
fn a_fork_in_the_middle_of_remaps_changes_nothing_for_the_parent() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    let backwards: Vec<i64> = (0..=LAST).rev().collect();
    let forwards: Vec<i64> = (0..=LAST).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                remap(&window, &backwards, 0, NOW);
                assert_eq!(shown(&window, 0..3), [2048, 2047, 2046]);
                remap(&window, &forwards, 0, LAZY);
                assert_eq!(shown(&window, 0..3), [1, 2, 3]);
            }
        });
        // Windows come and go beside, so that places in the list do, too.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let other = open(&store, &options(EngineKind::Paged));
                assert_eq!(shown(&other, 7..8), [8]);
            }
        });
        let either = |page: usize| {
            // One way round or the other, whatever was the case at the fork; not changing.
            let first = word(&window, page);
            let one = first == page as u64 + 1 || first == (PAGES - page) as u64;
            i32::from(!one) + wrong(&window, page, first)
        };
        let children: Vec<_> =
            (0..30).map(|page| in_child(|| map_much(&window) + either(page))).collect();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(children, [0; 30]);
    });
    remap(&window, &backwards, 0, NOW);
    assert_eq!(shown(&window, 0..PAGES), (1..=PAGES as u64).rev().collect::<Vec<_>>());
}
