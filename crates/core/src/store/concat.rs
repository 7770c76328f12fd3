//! Stores that consist of the files of other stores, one after another.
//!
//! The files are shared with the original stores. Their maps are not, so that each store has its
//! own limit. Page numbers are fixed: only the last file may become longer or shorter by a refresh.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::part::Part;
use super::{check_size, Store, StoreKind};
use crate::error::{Error, Result};
use crate::sys::file as sys_file;
use crate::units::{FilePage, PageIndex};

/// What messages call a part of a store.
fn name_of(part: &Part, index: usize) -> PathBuf {
    let unnamed = || format!("shared memory, number {index} of the row").into();
    part.name.clone().unwrap_or_else(unnamed)
}

impl Store {
    /// The pages of `members` as one run. They are kept alive, and a later call is
    /// refused once one of them is closed.
    ///
    /// # Errors
    /// [`Error::Argument`] for no stores, pages of different sizes, a store other than
    /// the last whose last page is cut, and a file that is there twice and may be written.
    pub fn concat(members: Vec<Arc<Self>>) -> Result<Self> {
        let Some(first) = members.first() else {
            return Err(Error::Argument("concat: there must be at least one store".into()));
        };
        let page_size = first.page_size;
        let mut parts: Vec<Part> = Vec::new();
        let mut size_bytes = 0_u64;
        for member in &members {
            member.check_open("concat")?;
            if member.is_provided() {
                return Err(Error::Unsupported {
                    operation: "concat",
                    reason: format!(
                        "{} has no file, and only the files of stores can be put in a row",
                        member.describe()
                    ),
                });
            }
            if member.page_size != page_size {
                return Err(Error::Argument(format!(
                    "concat: {} has pages of {} bytes and {} of {}; open them with the same \
                     page_bytes",
                    first.describe(),
                    page_size.bytes(),
                    member.describe(),
                    member.page_size.bytes(),
                )));
            }
            if let Some(part) =
                parts.last().filter(|_| !size_bytes.is_multiple_of(page_size.bytes() as u64))
            {
                return Err(Error::Argument(format!(
                    "concat: {} ends within a page: but for the last one, the files of a row have \
                     whole pages of {} bytes; use fremap.rows, which reads rows of any length \
                     from files of any length",
                    name_of(part, parts.len() - 1).display(),
                    page_size.bytes(),
                )));
            }
            let start = FilePage(page_size.count_of(size_bytes));
            for part in member.parts.all() {
                let name = Some(name_of(part, parts.len()));
                parts.push(Part::new(start.offset(part.first.0), name, Arc::clone(&part.file)));
            }
            size_bytes = size_bytes.saturating_add(member.size_bytes());
            check_size(size_bytes)?;
        }
        check_writable_once(&parts)?;
        Ok(Self::over(StoreKind::Concat, parts, members, size_bytes, page_size))
    }

    /// Sizes of the files, read again: the store's new one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Argument`] when a file other than the last has changed.
    pub(super) fn refreshed_size(&self) -> Result<u64> {
        let mut start_bytes = 0;
        for (index, part) in self.parts.all().iter().enumerate() {
            let facts = sys_file::facts(part.fd())
                .map_err(|errno| Self::part_error("refresh", part, errno))?;
            let had_bytes = self.part_bytes(index);
            if index + 1 == self.parts.all().len() {
                start_bytes += facts.size_bytes;
            } else if facts.size_bytes == had_bytes {
                start_bytes += had_bytes;
            } else {
                return Err(Error::Argument(format!(
                    "refresh: {} had {had_bytes} bytes and has {} now: the pages of the files \
                     behind it would have other numbers; make a new row",
                    name_of(part, index).display(),
                    facts.size_bytes,
                )));
            }
        }
        check_size(start_bytes)?;
        Ok(start_bytes)
    }
}

/// A window may show a page once if it is written, and knows pages by their numbers.
fn check_writable_once(parts: &[Part]) -> Result<()> {
    let mut seen: HashMap<(u64, u64), usize> = HashMap::new();
    for (index, part) in parts.iter().enumerate() {
        let name = || name_of(part, index);
        let facts = sys_file::facts(part.fd())
            .map_err(|errno| Error::system("concat", errno).of_file(Some(name())))?;
        let Some(other) = seen.insert(facts.identity, index) else { continue };
        if part.file.writable || parts[other].file.writable {
            return Err(Error::Argument(format!(
                "concat: {} is there twice, as number {other} and {index} of the row, and may be \
                 written; open it for reading, or give it once",
                name().display(),
            )));
        }
    }
    Ok(())
}
