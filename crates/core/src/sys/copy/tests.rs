//! What becomes of a SIGBUS: a copy's is an error, any other goes to the handler that was there
//! before. Signals are tried in children, because they may kill the process.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::file::{memory_file, truncate};
use super::super::forked::{self, End};
use super::super::mm::{system_page_bytes, Access, Region, Sharing};
use super::super::span::Span;
use super::{Recovery, RowCopies, SourceLost};

fn in_child(body: impl FnOnce()) -> End {
    // The child only uses what a child of a threaded process may: it takes no lock of another
    // thread's but the allocator's, which glibc resets.
    forked::in_child(|| {
        // SAFETY: changes how the child, which is about to end, handles signals.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            let nothing = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
            libc::sigprocmask(libc::SIG_SETMASK, &raw const nothing, ptr::null_mut());
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
            // The alternative stack of a Rust thread holds one signal's frame, not two.
            let disable =
                libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&raw const disable, ptr::null_mut());
        }
        body();
        0
    })
}

/// A map of two pages of which the file has lost the second.
fn cut_map() -> Region {
    let page = system_page_bytes();
    let fd = memory_file("cut").expect("made");
    truncate(fd.as_fd(), 2 * page as u64).expect("sized");
    let map = Region::file(fd.as_fd(), 2 * page, Access::Read).expect("mapped");
    truncate(fd.as_fd(), page as u64).expect("cut");
    map
}

fn fault() {
    let map = cut_map();
    // SAFETY: the page is mapped; that touching it is SIGBUS is the point.
    let byte = unsafe { ptr::read_volatile(map.start().wrapping_add(system_page_bytes())) };
    assert_eq!(byte, 0);
}

fn send() {
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGBUS) };
}

fn assert_recovers() {
    let recovery = Recovery::begin().expect("recovers");
    let page = system_page_bytes();
    let map = cut_map();
    let into = Region::anonymous(page, page, Access::Write).expect("memory");
    assert_eq!(recovery.copy(into.span(0, page), map.span(0, page), None, false), Ok(()));
    assert_eq!(
        recovery.copy(into.span(0, page), map.span(page, page), None, false),
        Err(SourceLost)
    );
}

fn install(handler: usize, flags: i32) -> libc::sigaction {
    // SAFETY: all zero is an action without flags; the handler has the kind that
    // the flags say.
    unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        let mut old = action;
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(libc::SIGBUS, &raw const action, &raw mut old), 0);
        old
    }
}

extern "C" fn exit_with_42(_: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    let code = if info.is_null() || context.is_null() { 41 } else { 42 };
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

extern "C" fn exit_with_43(_: i32) {
    // SAFETY: ends the process.
    unsafe { libc::_exit(43) }
}

static CALLS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: i32) {
    CALLS.fetch_add(1, Ordering::Relaxed);
}

/// The action that `hand_back` and `restore_and_raise` found.
static mut FOUND: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

fn install_over(handler: usize, flags: i32) {
    let found = install(handler, flags);
    // SAFETY: in a child with one thread, before any signal.
    unsafe { FOUND = MaybeUninit::new(found) };
}

/// Calls the handler that was there, as polite handlers do.
extern "C" fn hand_back(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);
    // SAFETY: what was found is our handler, which takes three arguments.
    unsafe {
        let found = (*(&raw const FOUND).cast::<libc::sigaction>()).sa_sigaction;
        std::mem::transmute::<usize, Handler>(found)(signal, info, context);
    }
}

/// Puts back what was there and raises the signal again, as Python's faulthandler does.
extern "C" fn restore_and_raise(signal: i32) {
    // SAFETY: both calls may be made in a handler.
    unsafe {
        libc::sigaction(signal, (&raw const FOUND).cast(), ptr::null_mut());
        libc::raise(signal);
    }
}

#[test]
fn a_copy_whose_source_is_cut_is_an_error() {
    let page = system_page_bytes();
    let map = cut_map();
    let into = Region::anonymous(2 * page, page, Access::Write).expect("memory");
    let recovery = Recovery::begin().expect("recovers");
    for (shift, keep) in [(0, false), (0, true), (1, false)] {
        for _ in 0..100 {
            let into = into.span(shift, page);
            assert_eq!(
                recovery.copy(into, map.span(0, page), Some(map.span(page, page)), keep),
                Ok(())
            );
            assert_eq!(recovery.copy(into, map.span(page, page), None, keep), Err(SourceLost));
            assert_eq!(recovery.copy(into, map.span(page / 2, page), None, keep), Err(SourceLost));
        }
    }
}

#[test]
fn copies_are_exact() {
    let mut source: Vec<u8> = (0..20_000_u32).map(|byte| (byte % 251) as u8).collect();
    let expected = source.clone();
    let source = super::Span::of(&mut source);
    let mut target = vec![0; 20_000];
    let recovery = Recovery::begin().expect("recovers");
    let places = [(0, 0, 4096), (16, 7, 8192), (3, 5, 4096), (32, 0, 100), (0, 1, 0)];
    for ((to, from, len), keep) in
        places.into_iter().flat_map(|place| [(place, false), (place, true)])
    {
        target.fill(0xee);
        let into = super::Span::of(&mut target).part(to, len);
        assert_eq!(recovery.copy(into, source.part(from, len), None, keep), Ok(()));
        assert_eq!(target[to..to + len], expected[from..from + len]);
        assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xee));
    }
}

#[test]
fn a_lost_target_is_not_a_lost_source() {
    let end = in_child(|| {
        let page = system_page_bytes();
        let fd = memory_file("cut").expect("made");
        truncate(fd.as_fd(), page as u64).expect("sized");
        let target = Region::anonymous(page, page, Access::Write).expect("memory");
        target.map_file(Sharing::Shared, 0, page, fd.as_fd(), 0, Access::Write).expect("mapped");
        truncate(fd.as_fd(), 0).expect("cut");
        let source = Region::anonymous(page, page, Access::Write).expect("memory");
        let recovery = Recovery::begin().expect("recovers");
        let _ = recovery.copy(target.span(0, page), source.span(0, page), None, false);
    });
    assert_eq!(end, End::Signal(libc::SIGBUS));
}

#[test]
fn the_default_ends_the_process_as_before() {
    for other in [fault, send] {
        let end = in_child(|| {
            assert_recovers();
            other();
        });
        assert_eq!(end, End::Signal(libc::SIGBUS));
    }
}

#[test]
fn a_handler_from_before_gets_what_is_not_ours() {
    for other in [fault, send] {
        let with_info = in_child(|| {
            install(exit_with_42 as *const () as usize, libc::SA_SIGINFO);
            assert_recovers();
            other();
        });
        assert_eq!(with_info, End::Exit(42));
        let without = in_child(|| {
            install(exit_with_43 as *const () as usize, 0);
            assert_recovers();
            other();
        });
        assert_eq!(without, End::Exit(43));
    }
}

#[test]
fn a_handler_from_later_is_noticed_and_gets_what_is_not_ours() {
    let end = in_child(|| {
        assert_recovers();
        install(exit_with_42 as *const () as usize, libc::SA_SIGINFO);
        assert_recovers();
        fault();
    });
    assert_eq!(end, End::Exit(42));
}

#[test]
fn an_ignored_signal_stays_ignored_and_a_fault_does_not() {
    let ignored = in_child(|| {
        install(libc::SIG_IGN, 0);
        assert_recovers();
        send();
    });
    assert_eq!(ignored, End::Exit(0));
    let fault = in_child(|| {
        install(libc::SIG_IGN, 0);
        assert_recovers();
        fault();
    });
    assert_eq!(fault, End::Signal(libc::SIGBUS));
}

#[test]
fn a_handler_for_one_signal_has_one() {
    let end = in_child(|| {
        install(count as *const () as usize, libc::SA_RESETHAND);
        assert_recovers();
        send();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        send();
    });
    assert_eq!(end, End::Signal(libc::SIGBUS));
}

#[test]
fn a_handler_that_returns_is_called_each_time() {
    let end = in_child(|| {
        install(count as *const () as usize, 0);
        assert_recovers();
        send();
        send();
        assert_recovers();
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn handlers_that_hand_back_do_not_go_in_circles() {
    for other in [fault, send] {
        let end = in_child(|| {
            assert_recovers();
            install_over(hand_back as *const () as usize, libc::SA_SIGINFO);
            assert_recovers();
            other();
        });
        assert_eq!(end, End::Signal(libc::SIGBUS));
        let end = in_child(|| {
            assert_recovers();
            install_over(restore_and_raise as *const () as usize, libc::SA_NODEFER);
            assert_recovers();
            other();
        });
        assert_eq!(end, End::Signal(libc::SIGBUS));
    }
}

#[test]
fn two_that_insist_end_in_system_calls() {
    const ROUNDS: usize = 300;
    let end = in_child(|| {
        let mut recovered = 0;
        for round in 0..ROUNDS {
            // The same handler once more would not count as another one.
            let others = [exit_with_43 as *const (), count as *const ()];
            install(others[round % 2] as usize, 0);
            recovered += usize::from(Recovery::begin().is_ok());
        }
        assert!(recovered > 0 && recovered < ROUNDS);
        install(exit_with_42 as *const () as usize, libc::SA_SIGINFO);
        assert!(super::recovery_available().is_err());
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn with_the_signal_blocked_nothing_is_copied() {
    let end = in_child(|| {
        super::super::thread::block_all_signals().expect("blocked");
        assert!(super::recovery_available().is_err());
        assert!(Recovery::begin().is_err());
    });
    assert_eq!(end, End::Exit(0));
}

#[test]
fn rows_of_every_size_are_copied_whole() {
    let recovery = Recovery::begin().expect("recovers");
    let source: Vec<u8> = (0..40_000_u32).map(|byte| (byte % 251) as u8).collect();
    let mut from = source.clone();
    let from = Span::of(&mut from);
    for row_bytes in (1..200).chain([511, 512, 1000, 2047, 2048, 2049, 4096]) {
        let mut copies = RowCopies::new(row_bytes);
        let offsets: Vec<usize> = (0..40).map(|row| row * 7919 % (40_000 - row_bytes)).collect();
        for &offset in &offsets {
            copies.push(from.part(offset, row_bytes));
        }
        let mut into = vec![0xee; 40 * row_bytes + 64];
        let memory = Span::of(&mut into);
        recovery.copy_rows(&mut copies, memory.part(32, 40 * row_bytes)).expect("copied");
        let expected: Vec<u8> = offsets
            .iter()
            .flat_map(|&offset| source[offset..offset + row_bytes].to_vec())
            .collect();
        let into = memory.to_vec();
        assert_eq!(&into[32..32 + expected.len()], expected, "rows of {row_bytes} bytes");
        assert_eq!(&into[..32], [0xee; 32], "nothing before the rows of {row_bytes} bytes");
        assert_eq!(&into[32 + expected.len()..], [0xee; 32], "nothing behind");
    }
}

#[test]
fn the_row_that_is_lost_is_told() {
    let recovery = Recovery::begin().expect("recovers");
    let page = system_page_bytes();
    let map = cut_map();
    for row_bytes in [1, 5, 8, 15, 16, 40, 160, 2000, 3000] {
        let mut copies = RowCopies::new(row_bytes);
        assert_eq!(recovery.copy_rows(&mut copies, Span::of(&mut [])), Ok(()));
        for row in 0..30 {
            // The 20th ends beyond the page that is there.
            let offset = if row == 20 { page + 1 - row_bytes } else { 0 };
            copies.push(map.span(offset, row_bytes));
        }
        assert_eq!(copies.len(), 30);
        copies.push_last_again();
        let mut into = vec![1; 31 * row_bytes];
        let memory = Span::of(&mut into);
        assert_eq!(recovery.copy_rows(&mut copies, memory), Err(20), "rows of {row_bytes} bytes");
        assert_eq!(&memory.to_vec()[..20 * row_bytes], vec![0; 20 * row_bytes]);
        assert_eq!(memory.to_vec()[30 * row_bytes], 1, "nothing behind the lost row");
        copies.clear();
        assert!(copies.is_empty());
    }
}
