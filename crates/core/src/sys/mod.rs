//! The kernel: one function a system call, and all of this crate's `unsafe`.

pub mod call;
pub mod child;
mod children;
pub mod clock;
pub mod copy;
pub mod cputime;
pub mod fault_ranges;
pub mod file;
pub mod forever;
pub mod fork;
pub mod fork_lock;
pub mod futex;
pub mod lock;
pub mod mm;
pub mod pagemap;
pub mod probe;
pub mod process;
pub mod ring;
pub mod signal;
pub mod span;
pub mod stderr_line;
pub mod thread;
pub mod uffd;
