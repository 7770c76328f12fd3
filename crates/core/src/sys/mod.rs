//! The kernel: one function a system call, and all of this crate's `unsafe`.

pub mod call;
pub mod copy;
pub mod file;
mod fork;
pub mod lock;
pub mod mm;
pub mod pagemap;
pub mod probe;
pub mod ring;
pub mod span;
pub mod tell;
pub mod thread;
pub mod uffd;
