//! The identity of a store, by which two processes know that they mean the same one.

use std::hash::Hasher;

use xxhash_rust::xxh3::Xxh3;

use super::Store;
use crate::error::{Error, Result};
use crate::sys::file as sys_file;

/// A store, told from others on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreIdentity {
    /// A hash of its files: devices, numbers and when they were made.
    pub files: u64,
    /// A hash of when they were changed last.
    pub changed: u64,
}

impl Store {
    /// Which files the store shows, and as of when.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] where other processes provide the pages, and nothing
    /// tells their content from any other.
    pub fn identity(&self, operation: &'static str) -> Result<StoreIdentity> {
        if let Some(provider) = &self.provider {
            // The content never changes: of another version the hash is another one.
            let known = provider.content_hash.map(|files| StoreIdentity { files, changed: 0 });
            return known.ok_or_else(|| Error::Unsupported {
                operation,
                reason: "other processes cannot tell whether their store has the same pages: they \
                         are computed, or come from a server that tells no version of an object, \
                         or by a file system or store instead of a URL; leave out shared="
                    .into(),
            });
        }
        let (mut files, mut changed) = (Xxh3::new(), Xxh3::new());
        for part in self.parts().all() {
            let facts = sys_file::born_facts(part.fd());
            let (facts, born) = facts.map_err(|errno| Self::part_error(operation, part, errno))?;
            let (device, number) = facts.identity;
            for word in [part.first.0, device, number, born] {
                files.write_u64(word);
            }
            changed.write_i64(facts.changed_ns);
        }
        Ok(StoreIdentity { files: files.finish(), changed: changed.finish() })
    }
}
