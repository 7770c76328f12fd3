//! Stores over ordinary files and block devices.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::{check_size, checked_page_size, OpenMode, Opened, Store, StoreKind};
use crate::error::{Error, Result};
use crate::sys::file::{self as sys_file, OpenFlags};

const NO_DIRECT: &str = "the file system does not do O_DIRECT; open the file without direct=True";

fn open_error(path: Option<&Path>, errno: Errno) -> Error {
    Error::system("open", errno).of_file(path)
}

/// Refuses what has no numbered pages.
fn check_type(file_type: FileType, path: Option<&Path>) -> Result<()> {
    let name = path.map_or_else(|| "the descriptor".into(), |path| path.display().to_string());
    match file_type {
        FileType::RegularFile | FileType::BlockDevice => Ok(()),
        FileType::Directory => Err(open_error(path, Errno::ISDIR)),
        FileType::Fifo => Err(Error::Argument(format!("open: {name} is a pipe and has no pages"))),
        FileType::Socket => {
            Err(Error::Argument(format!("open: {name} is a socket and has no pages")))
        }
        _ => Err(Error::Argument(format!(
            "open: {name} is neither a file nor a block device and has no pages"
        ))),
    }
}

/// The same file past the page cache.
fn reopen_direct(fd: BorrowedFd<'_>, writable: bool, path: Option<&Path>) -> Result<OwnedFd> {
    sys_file::reopen(fd, writable, true).map_err(|errno| match errno {
        Errno::INVAL => Error::Unsupported { operation: "open", reason: NO_DIRECT.into() },
        errno => open_error(path, errno),
    })
}

impl Store {
    /// Opens a file or a block device.
    ///
    /// # Errors
    /// [`Error::Io`] with the kernel's answer; [`Error::Argument`] for what has
    /// no pages; [`Error::Unsupported`] when `direct` is not to be had.
    pub fn open(
        path: &Path,
        mode: OpenMode,
        page_bytes: Option<u64>,
        direct: bool,
    ) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        let writable = mode != OpenMode::Read;
        let create = matches!(mode, OpenMode::Create { .. });
        let fail = |errno| open_error(Some(path), errno);
        let fd = sys_file::open(path, OpenFlags { writable, create, direct: false })
            .map_err(|errno| not_a_file(path, errno))?;
        let facts = sys_file::facts(fd.as_fd()).map_err(fail)?;
        check_type(facts.file_type, Some(path))?;
        let direct_fd =
            direct.then(|| reopen_direct(fd.as_fd(), writable, Some(path))).transpose()?;
        if let OpenMode::Create { size_bytes } = mode {
            check_size(size_bytes)?;
            // Emptied only now that nothing else can be refused: not even the size, which the file
            // system or a limit of the process may not allow.
            if size_bytes > facts.size_bytes {
                sys_file::truncate(fd.as_fd(), size_bytes).map_err(fail)?;
            }
            sys_file::truncate(fd.as_fd(), 0).map_err(fail)?;
            sys_file::truncate(fd.as_fd(), size_bytes).map_err(fail)?;
        }
        let size_bytes = sys_file::facts(fd.as_fd()).map_err(fail)?.size_bytes;
        let path = Some(path.to_path_buf());
        let kind = StoreKind::File;
        let opened = Opened { kind, path, writable, fd, direct_fd, size_bytes };
        Self::new(opened, page_size)
    }

    /// A store over an open descriptor, which it takes over.
    ///
    /// # Errors
    /// As [`open`](Self::open); EBADF when the descriptor was not opened for
    /// reading, or not for writing and `writable` is asked for.
    pub fn from_fd(
        fd: OwnedFd,
        writable: bool,
        page_bytes: Option<u64>,
        direct: bool,
    ) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        let path = sys_file::known_path(fd.as_fd());
        let fail = |errno| open_error(path.as_deref(), errno);
        let facts = sys_file::facts(fd.as_fd()).map_err(fail)?;
        check_type(facts.file_type, path.as_deref())?;
        let flags = sys_file::opened_with(fd.as_fd()).map_err(fail)?;
        let access = flags & OFlags::RWMODE;
        if access == OFlags::WRONLY || (writable && access != OFlags::RDWR) {
            return Err(fail(Errno::BADF));
        }
        if writable && flags.contains(OFlags::APPEND) {
            return Err(Error::Argument(
                "open: the descriptor was opened to append (O_APPEND), so the kernel would write \
                 every page behind the end of the file; open it without"
                    .into(),
            ));
        }
        let direct_fd =
            direct.then(|| reopen_direct(fd.as_fd(), writable, path.as_deref())).transpose()?;
        // What goes through the page cache must not be bound by O_DIRECT's alignment.
        let fd = if flags.contains(OFlags::DIRECT) {
            sys_file::reopen(fd.as_fd(), writable, false).map_err(fail)?
        } else {
            fd
        };
        let size_bytes = facts.size_bytes;
        let kind = StoreKind::File;
        let opened = Opened { kind, path: shown_path(path), writable, fd, direct_fd, size_bytes };
        Self::new(opened, page_size)
    }
}

/// Opening a directory for writing is EISDIR and a socket ENXIO: say the latter plainly.
fn not_a_file(path: &Path, errno: Errno) -> Error {
    if errno == Errno::NXIO {
        return Error::Argument(format!(
            "open: {} is a socket or a pipe and has no pages",
            path.display()
        ));
    }
    open_error(Some(path), errno)
}

/// A path for messages; none where the kernel's name is not one that opens.
fn shown_path(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.to_string_lossy().ends_with(" (deleted)"))
}
