//! What children of `fork` find where a paged window is in their parent: nothing
//! that can be read, ever. Children here allocate nothing, as they are forked
//! from a process with threads.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{numbered, open, options, remap, shown, LAZY, NOW, PAGE};
use fremap_core::engine::EngineKind;
use fremap_core::window::Window;

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

fn touch(window: &Window, page: usize) -> i32 {
    // SAFETY: within the window; that the read is a signal is the point.
    i32::from(unsafe { window.memory().start().wrapping_add(page * PAGE).read_volatile() })
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
fn a_childs_touch_is_a_signal_whether_the_page_was_present_or_not() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    remap(&window, &[7, 8, 9], 3, NOW);
    for page in [3, 5, 0, PAGES - 1] {
        assert_eq!(in_child(|| touch(&window, page)), -libc::SIGSEGV, "page {page}");
    }
    assert_eq!(shown(&window, 0..8), [1, 2, 3, 8, 9, 10, 7, 8]);
}

#[test]
fn nothing_that_a_child_allocates_lands_in_the_window() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    remap(&window, &(0..=LAST).rev().collect::<Vec<_>>(), 0, NOW);
    assert_eq!(in_child(|| map_much(&window)), 0);
    let after_all_that = || {
        map_much(&window);
        touch(&window, PAGES / 2)
    };
    assert_eq!(in_child(after_all_that), -libc::SIGSEGV);
}

#[test]
fn a_child_of_a_child_finds_nothing_either() {
    let store = numbered(PAGES as u64);
    let window = open(&store, &options(EngineKind::Paged));
    let allocates = || in_child(|| map_much(&window));
    assert_eq!(in_child(allocates), 0);
    let touches = || i32::from(in_child(|| touch(&window, 1)) == -libc::SIGSEGV);
    assert_eq!(in_child(touches), 1);
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
        let children: Vec<_> =
            (0..30).map(|page| in_child(|| map_much(&window) + touch(&window, page))).collect();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(children, [-libc::SIGSEGV; 30]);
    });
    remap(&window, &backwards, 0, NOW);
    assert_eq!(shown(&window, 0..PAGES), (1..=PAGES as u64).rev().collect::<Vec<_>>());
}
