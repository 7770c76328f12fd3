//! Rings: reads in flight together (`io_uring`, Linux 5.11 and later).

use rustix::io::Errno;

use super::call::{enter, Call};
use super::mm::last_errno;

/// Idle rings that a store keeps.
#[derive(Debug, Default)]
pub struct RingPool {}

/// All signals blocked in the calling thread; dropping it puts the mask back.
/// A thread that is started meanwhile begins with all signals blocked.
#[derive(Debug)]
pub struct BlockedSignals {
    before: libc::sigset_t,
}

/// Blocks all signals in the calling thread.
///
/// # Errors
/// Those of `pthread_sigmask`, which has none for these arguments.
pub fn block_signals() -> Result<BlockedSignals, Errno> {
    enter(Call::SignalMask)?;
    // SAFETY: both sets are plain data that the calls fill.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        if libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before) != 0 {
            return Err(last_errno());
        }
        Ok(BlockedSignals { before })
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by `block_signals`.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut());
        }
    }
}
