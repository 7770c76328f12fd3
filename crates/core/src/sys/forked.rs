//! Children of fork, for tests.

use std::panic::{catch_unwind, AssertUnwindSafe};

/// How a child has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    Exit(i32),
    Signal(i32),
}

/// Seconds after which a child that hangs dies of SIGALRM.
const PATIENCE: u32 = 20;
/// What a child exits with that panics.
const PANICKED: i32 = 101;

/// Runs `body` in a child, which then ends at once, as if it were killed there; exits with what
/// `body` says.
pub(crate) fn in_child(body: impl FnOnce() -> i32) -> End {
    // SAFETY: the child does what `body` does, and ends without running anything else.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            libc::alarm(PATIENCE);
            // A panic that ended only this thread would count as an end like any other.
            let outcome = catch_unwind(AssertUnwindSafe(body));
            libc::_exit(outcome.unwrap_or(PANICKED));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        if libc::WIFSIGNALED(status) {
            End::Signal(libc::WTERMSIG(status))
        } else {
            End::Exit(libc::WEXITSTATUS(status))
        }
    }
}

/// Runs `body` in a child that then dies.
pub(crate) fn dies_after(body: impl FnOnce()) {
    let ended = in_child(|| {
        body();
        0
    });
    assert_eq!(ended, End::Exit(0));
}
