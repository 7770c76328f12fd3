//! How much memory a window may take, and how it maps its file if it is a mapping of it.

use crate::sys::mm::{Region, Sharing};
use crate::trim::ReadAhead;

/// How a window is a mapping of its file, where it is one (engine `alias`).
#[derive(Debug)]
pub struct MappingOptions {
    /// Whether other mappings see writes; a private window does not need a writable store.
    pub sharing: Sharing,
    /// How the kernel reads ahead; None if that is to follow how the window is touched.
    pub advice: Option<ReadAhead>,
    /// Where it is to be; else where the kernel finds room.
    pub region: Option<Region>,
}

impl Default for MappingOptions {
    fn default() -> Self {
        Self { sharing: Sharing::Shared, advice: None, region: None }
    }
}

/// How much memory a window may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// A share of half of what the process may have.
    Auto,
    /// What it is asked to show.
    Unlimited,
    /// At most this number of bytes.
    Bytes(u64),
}
