//! One shared object for each process, which exists as long as it is used.

use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::fork_lock::ForkLock;
use super::process;

/// A value that its users in a process share; a child of fork has one of its own.
#[derive(Debug)]
pub struct PerProcess<T>(ForkLock<Option<Of<T>>>);

/// The value, and the process that made it.
#[derive(Debug)]
struct Of<T> {
    process: u32,
    value: Weak<T>,
}

impl<T> PerProcess<T> {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(ForkLock::new(None))
    }

    /// The value of this process, or a new one by `make`.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(&self, make: impl FnOnce() -> Result<T, Errno>) -> Result<Arc<T>, Errno> {
        let mut of = self.0.lock();
        let process = process::id();
        let own = of.as_ref().filter(|of| of.process == process);
        if let Some(value) = own.and_then(|of| of.value.upgrade()) {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        *of = Some(Of { process, value: Arc::downgrade(&value) });
        Ok(value)
    }
}

impl<T> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_lasts_as_long_as_its_users() {
        static NUMBERS: PerProcess<u32> = PerProcess::new();
        let first = NUMBERS.get(|| Ok(1)).unwrap();
        let second = NUMBERS.get(|| Ok(2)).unwrap();
        assert_eq!((*first, *second), (1, 1));
        drop((first, second));
        assert_eq!(NUMBERS.get(|| Err(Errno::MFILE)), Err(Errno::MFILE));
        assert_eq!(*NUMBERS.get(|| Ok(3)).unwrap(), 3);
    }
}
