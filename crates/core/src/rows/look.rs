//! Looking at files before any row is read: their sizes, and their first bytes.

use std::num::NonZero;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;
use std::thread::available_parallelism;

use rustix::io::Errno;

use crate::sys::file::{self as sys_file, Facts, OpenFlags};
use crate::sys::span::Span;
use crate::sys::thread::work_together;

/// Files that pay for the start of a thread.
const PATHS_A_THREAD: usize = 32;
/// Files that a thread looks at, one after another, before it asks for more.
const PATHS_A_TURN: usize = 8;
const MAX_THREADS: usize = 4;

/// A file that was looked at.
#[derive(Debug)]
pub struct Front {
    /// What it is.
    pub facts: Facts,
    /// When it was made; 0 where that is not told.
    pub born_ns: u64,
    /// What it begins with; nothing if it is no ordinary file.
    pub bytes: Vec<u8>,
}

/// Looks at files, several at once where they are many, and at the first `front_bytes` bytes of
/// each that is an ordinary one, and may be read. Others are not opened: whoever writes to a pipe
/// would go on.
///
/// In each place what is found there, or the kernel's own error.
#[must_use]
pub fn look(paths: &[PathBuf], front_bytes: usize) -> Vec<Result<Front, Errno>> {
    let next = AtomicUsize::new(0);
    let found: Vec<OnceLock<_>> = paths.iter().map(|_| OnceLock::new()).collect();
    let threads = available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS);
    let helpers = (paths.len() / PATHS_A_THREAD).min(threads - 1);
    work_together(helpers, || loop {
        let first = next.fetch_add(PATHS_A_TURN, Ordering::Relaxed);
        let turn = first.min(paths.len())..(first + PATHS_A_TURN).min(paths.len());
        if turn.is_empty() {
            break;
        }
        for (path, found) in paths[turn.clone()].iter().zip(&found[turn]) {
            let _first = found.set(look_at(path, front_bytes));
        }
    });
    let missing = || Err(Errno::NOTRECOVERABLE);
    found.into_iter().map(|found| found.into_inner().unwrap_or_else(missing)).collect()
}

fn look_at(path: &Path, front_bytes: usize) -> Result<Front, Errno> {
    let (facts, born_ns) = sys_file::path_facts(path)?;
    if !facts.file_type.is_file() {
        return Ok(Front { facts, born_ns, bytes: Vec::new() });
    }
    let fd = sys_file::open(path, OpenFlags::default())?;
    if front_bytes == 0 {
        return Ok(Front { facts, born_ns, bytes: Vec::new() });
    }
    // There may be another one by now.
    let (facts, born_ns) = sys_file::born_facts(fd.as_fd())?;
    let wanted = usize::try_from(facts.size_bytes).unwrap_or(usize::MAX).min(front_bytes);
    let mut bytes = vec![0; wanted];
    let read = sys_file::read_at(fd.as_fd(), Span::of(&mut bytes), 0)?;
    bytes.truncate(read);
    Ok(Front { facts, born_ns, bytes })
}
