//! The kernel: one function for each system call, and all `unsafe` of this crate.

pub mod arrivals;
pub mod cachestat;
pub mod call;
pub mod child;
mod children;
pub mod clock;
pub mod copy;
pub mod cputime;
pub mod fault_ranges;
pub mod file;
pub mod fork;
pub mod fork_lock;
#[cfg(test)]
pub(crate) mod forked;
pub mod futex;
pub mod lock;
pub mod mm;
pub mod owner;
pub mod pagemap;
pub mod per_process;
pub mod poller;
pub mod probe;
pub mod process;
pub mod reserve;
pub mod ring;
pub mod shm;
pub mod signal;
pub mod span;
pub mod stderr_line;
pub mod thread;
pub mod uffd;
pub mod zeros;
