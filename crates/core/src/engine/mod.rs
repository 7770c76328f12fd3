//! The ways a window is done on this kernel, behind one trait.

use std::fmt;

/// Which engine a window uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// A kernel mapping per extent; coherent.
    Alias,
    /// One anonymous mapping under userfaultfd; a cache of the store.
    Paged,
    /// Plain anonymous memory, filled at `remap`.
    Eager,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Alias => "alias",
            Self::Paged => "paged",
            Self::Eager => "eager",
        })
    }
}
