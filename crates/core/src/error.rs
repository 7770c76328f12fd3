//! Errors: what failed, where, which limit, and what to do about it.
//!
//! The binding turns each variant into the Python exception of the same name;
//! the text is written here, once.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;

/// The result of anything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A page index outside its limit.
    #[error("{operation}: {coordinate} {index} is outside {least}..{limit}")]
    PageRange {
        /// The operation that was asked for.
        operation: &'static str,
        /// "file page", "window page", "row" or "key".
        coordinate: &'static str,
        /// The first index that is outside.
        index: i64,
        /// The least index that may be given: negative ones count from the end.
        least: i64,
        /// The number of pages there are.
        limit: u64,
    },
    /// An argument that can never be right.
    #[error("{0}")]
    Argument(String),
    /// A placed page would be lost.
    #[error(
        "{operation}: window page {window_page} was placed and has no file behind it, so its \
         content would be lost; pass discard=True to drop it"
    )]
    Placed {
        /// The operation that was asked for.
        operation: &'static str,
        /// The first placed page in its range.
        window_page: u64,
    },
    /// A writable file page would be shown twice.
    #[error(
        "{operation}: file page {file_page} would be shown by window pages {window_page} and \
         {other_page}; a write to one of these copies would not reach the other: show the file \
         page once, or protect both with READ"
    )]
    Alias {
        /// The operation that was asked for.
        operation: &'static str,
        /// The file page.
        file_page: u64,
        /// A window page that would show it.
        window_page: u64,
        /// Another one.
        other_page: u64,
    },
    /// Too many kernel mappings.
    #[error(
        "{operation}: this needs up to {needed} kernel mappings; the process has {in_use}, so {} \
         of vm.max_map_count = {limit} are left, and fremap leaves 1000 of them for other code; \
         use longer extents, or `sysctl vm.max_map_count={}`, or engine=\"paged\" (one mapping \
         for any order) if the window need not be coherent",
        limit.saturating_sub(*in_use),
        in_use.saturating_add(*needed).saturating_add(1000).max(limit.saturating_add(1))
    )]
    MappingLimit {
        /// The operation that was asked for.
        operation: &'static str,
        /// Mappings the operation would add.
        needed: u64,
        /// Mappings the process has.
        in_use: u64,
        /// `vm.max_map_count`.
        limit: u64,
    },
    /// A file system does not have the space for shared memory.
    #[error(
        "{operation}: {wanted} bytes of shared memory do not fit into {}, which has {free} free; \
         ask for less, remove what is there, or mount it with a larger size", path.display()
    )]
    SharedMemory {
        /// The operation that was asked for.
        operation: &'static str,
        /// Where the file system is mounted.
        path: PathBuf,
        /// Bytes that were asked for.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// More memory than there is.
    #[error(
        "{operation}: this needs {wanted} bytes of memory and {available} are available; ask for \
         fewer pages at a time"
    )]
    Memory {
        /// The operation that was asked for.
        operation: &'static str,
        /// Bytes that would have to become present.
        wanted: u64,
        /// Bytes that the machine, or the memory cgroup, has left.
        available: u64,
        /// Pages from the front of the request that are done.
        completed: usize,
    },
    /// More than a memory budget.
    #[error(
        "{operation}: this needs {wanted} bytes of memory and the budget is {budget}: {why}; give a \
         larger budget, or pass budget=None"
    )]
    Budget {
        /// The operation that was asked for.
        operation: &'static str,
        /// Bytes that would be needed.
        wanted: u64,
        /// The budget.
        budget: u64,
        /// What keeps it from being enough.
        why: &'static str,
    },
    /// More extents than there are slots for.
    #[error(
        "{operation}: {wanted} extents do not fit: {pinned} of {slots} slots are pinned for other \
         extents; name fewer keys at a time, release pins, or make more slots"
    )]
    Slots {
        /// The operation that was asked for.
        operation: &'static str,
        /// Different extents that were named.
        wanted: usize,
        /// Slots there are.
        slots: usize,
        /// Slots that are pinned for other extents.
        pinned: usize,
    },
    /// A system call failed.
    #[error("{operation}{}: {}{hint}", place(*file_page), describe(*errno))]
    Io {
        /// The operation that was asked for.
        operation: &'static str,
        /// The file, where it has a name.
        path: Option<PathBuf>,
        /// The page at fault, where one is known.
        file_page: Option<u64>,
        /// The kernel's answer.
        errno: Errno,
        /// Pages from the front of the request that are done.
        completed: usize,
        /// What to do, starting with "; ", or nothing.
        hint: Cow<'static, str>,
    },
    /// The file is shorter than it was when the store was opened.
    #[error(
        "{operation}: the file ends {} file page {file_page}, because it was truncated after the \
         store was opened; call refresh() to read its size again",
        if *in_part { "in the middle of" } else { "before" }
    )]
    Truncated {
        /// The operation that was asked for.
        operation: &'static str,
        /// The file, where it has a name.
        path: Option<PathBuf>,
        /// The first page that is missing.
        file_page: u64,
        /// The file still has a part of that page.
        in_part: bool,
        /// Pages from the front of the request that are done.
        completed: usize,
    },
    /// A row that cannot be read.
    #[error("{operation}: row {row}: {loss}")]
    Row {
        /// The operation that was asked for.
        operation: &'static str,
        /// The file, where it has a name.
        path: Option<PathBuf>,
        /// The row, counted through all files.
        row: u64,
        /// What is wrong with it.
        loss: RowLoss,
    },
    /// An engine, kernel or file that cannot do this.
    #[error("{operation}: {reason}")]
    Unsupported {
        /// The operation that was asked for.
        operation: &'static str,
        /// The engine, kernel version and remedy.
        reason: String,
    },
    /// The object is closed.
    #[error("{operation}: the {what} is closed")]
    Closed {
        /// The operation that was asked for.
        operation: &'static str,
        /// "store" or "window".
        what: &'static str,
    },
    /// A store that is part of a `ConcatStore` is closed.
    #[error("{operation}: store {index} of the ConcatStore ({member}) is closed")]
    MemberClosed {
        /// The operation that was asked for.
        operation: &'static str,
        /// Its place among the stores.
        index: usize,
        /// What it is called.
        member: String,
    },
    /// The object belongs to the parent process.
    #[error(
        "{operation}: this {what} was made before fork(), in process {owner}; make a new one in \
         this process"
    )]
    Fork {
        /// The operation that was asked for.
        operation: &'static str,
        /// "store" or "window".
        what: &'static str,
        /// The process that made it.
        owner: u32,
    },
    /// No thread of fremap's own can be started.
    #[error(
        "{operation}: no thread can be started ({}): a limit on processes or memory is reached \
         (ulimit -u, ulimit -v, pids.max of the cgroup); raise it, or {instead}",
        describe(*errno)
    )]
    NoThread {
        /// The operation that was asked for.
        operation: &'static str,
        /// What needs no thread.
        instead: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A provider process did not deliver pages.
    #[error("{operation}{}: {}", pages(*file_page, *page_count), said.reason)]
    Provider {
        /// The operation that was asked for.
        operation: &'static str,
        /// What messages call the place that the pages come from, where it has a name.
        path: Option<PathBuf>,
        /// The first of the pages that were asked for together.
        file_page: Option<u64>,
        /// How many they were.
        page_count: usize,
        /// What is known of why.
        said: Box<Said>,
        /// Pages from the front of the request that are done.
        completed: usize,
    },
    /// The caller's interrupt (Ctrl-C) stopped the operation.
    #[error("interrupted after {completed} pages")]
    Interrupted {
        /// Pages from the front of the request that are done.
        completed: usize,
    },
}

/// What a provider process said about a failed request, or what is known about the process.
#[derive(Debug)]
pub struct Said {
    /// The errno of the exception that the program raised; EIO if it has none.
    pub errno: Errno,
    /// One line that says what went wrong.
    pub reason: String,
    /// The program's traceback, or empty.
    pub traceback: String,
    /// The exception as pickled by the process, or empty.
    pub pickled: Vec<u8>,
}

/// What is wrong with a row or its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowLoss {
    /// The file is shorter than it was.
    #[error(
        "the file has {size_bytes} bytes now and ends before the row does, because it was \
         truncated after it was opened; open it again"
    )]
    Truncated {
        /// Bytes that it has now.
        size_bytes: u64,
    },
    /// Another file has its name.
    #[error("the path now leads to another file; open it again")]
    Replaced,
    /// A system call failed.
    #[error("{}", describe(*.0))]
    Io(Errno),
}

impl Error {
    /// A failed system call that concerns no page and no file.
    #[must_use]
    pub fn system(operation: &'static str, errno: Errno) -> Self {
        Self::Io { operation, path: None, file_page: None, errno, completed: 0, hint: "".into() }
    }

    /// A failed system call with its remedy.
    #[must_use]
    pub fn system_with_hint(operation: &'static str, errno: Errno, hint: &'static str) -> Self {
        Self::Io { operation, path: None, file_page: None, errno, completed: 0, hint: hint.into() }
    }

    /// The same failure of a system call or a provider, of a file.
    #[must_use]
    pub fn of_file(mut self, of: Option<impl Into<PathBuf>>) -> Self {
        if let Self::Io { path, .. } | Self::Provider { path, .. } = &mut self {
            *path = of.map(Into::into);
        }
        self
    }

    /// An operation that `engine` does not have.
    #[must_use]
    pub fn unsupported(
        operation: &'static str,
        engine: impl std::fmt::Display,
        reason: &str,
    ) -> Self {
        Self::Unsupported { operation, reason: format!("engine \"{engine}\" {reason}") }
    }

    /// The same error, with the number of pages that were completed before it.
    #[must_use]
    pub fn with_completed(mut self, done: usize) -> Self {
        match &mut self {
            Self::Io { completed, .. }
            | Self::Truncated { completed, .. }
            | Self::Memory { completed, .. }
            | Self::Provider { completed, .. }
            | Self::Interrupted { completed } => *completed = done,
            _ => {}
        }
        self
    }

    /// The same error, attributed to the operation that the caller asked for.
    #[must_use]
    pub fn with_operation(mut self, asked: &'static str) -> Self {
        if let Self::Io { operation, .. }
        | Self::Truncated { operation, .. }
        | Self::Provider { operation, .. } = &mut self
        {
            *operation = asked;
        }
        self
    }

    /// Pages completed before the error.
    #[must_use]
    pub fn completed(&self) -> usize {
        match self {
            Self::Io { completed, .. }
            | Self::Truncated { completed, .. }
            | Self::Memory { completed, .. }
            | Self::Provider { completed, .. }
            | Self::Interrupted { completed } => *completed,
            _ => 0,
        }
    }
}

fn place(file_page: Option<u64>) -> String {
    file_page.map_or_else(String::new, |page| format!(" (file page {page})"))
}

fn pages(first: Option<u64>, count: usize) -> String {
    match first {
        Some(first) if count > 1 => format!(" ({count} file pages from {first})"),
        _ => place(first),
    }
}

/// What the kernel's answer means, as `strerror` has it: the number stands beside it.
#[must_use]
pub fn describe(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

/// How long an operation waits at most before it asks whether it is to stop.
pub const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// A long operation asks between its steps whether the caller wants it to stop.
///
/// [`Error::Interrupted`] ends the operation once nothing is in flight.
pub trait Interrupt {
    /// # Errors
    /// [`Error::Interrupted`] when the operation is to stop.
    fn check(&self) -> Result<()>;
}

/// Never stops anything.
#[derive(Clone, Copy, Debug)]
pub struct Uninterruptible;

impl Interrupt for Uninterruptible {
    fn check(&self) -> Result<()> {
        Ok(())
    }
}
