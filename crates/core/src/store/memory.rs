//! Stores over shared memory: anonymous (memfd) or named in `/dev/shm`.
//!
//! A page that was never written is a hole: it reads as zeros, is not resident, and reading it
//! allocates nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::{check_size, checked_page_size, Opened, Store, StoreKind};
use crate::error::{Error, Result};
use crate::sys::file as sys_file;
use crate::units::PageSize;

/// The file system of named shared memory.
const SHARED_MEMORY: &str = "/dev/shm";
/// How the kernel shows an anonymous store in `/proc/self/maps`.
const MEMFD_NAME: &str = "fremap";

/// The path of a name that is one component below `/dev/shm`, but for a leading slash.
fn checked_path(name: &str) -> Result<PathBuf> {
    let bare = name.strip_prefix('/').unwrap_or(name);
    if bare.is_empty() || bare == "." || bare == ".." || bare.contains(['/', '\0']) {
        return Err(Error::Argument(format!(
            "the name of a shared memory store is {name:?}; it must be one component without \
             slashes, as it names a file in /dev/shm"
        )));
    }
    Ok(Path::new(SHARED_MEMORY).join(bare))
}

impl Store {
    /// Anonymous shared memory of `size_bytes` bytes, all zero.
    ///
    /// # Errors
    /// [`Error::Io`] with the kernel's answer.
    pub fn memory(size_bytes: u64, page_bytes: Option<u64>) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        check_size(size_bytes)?;
        let fail = |errno| Error::system("open", errno);
        let fd = sys_file::memory_file(MEMFD_NAME).map_err(fail)?;
        sys_file::truncate(fd.as_fd(), size_bytes).map_err(fail)?;
        Self::over_memory(fd, None, size_bytes, page_size)
    }

    /// A store over the memory behind a descriptor (from another process), which it takes over.
    ///
    /// # Errors
    /// [`Error::Io`]; EBADF unless it is open for reading and writing;
    /// [`Error::Argument`] when it is no file.
    pub fn memory_from_fd(fd: OwnedFd, page_bytes: Option<u64>) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        let fail = |errno| Error::system("open", errno);
        let facts = sys_file::facts(fd.as_fd()).map_err(fail)?;
        if facts.file_type != FileType::RegularFile {
            return Err(Error::Argument("open: the descriptor is not shared memory".into()));
        }
        let flags = sys_file::opened_with(fd.as_fd()).map_err(fail)?;
        if flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(fail(Errno::BADF));
        }
        Self::over_memory(fd, None, facts.size_bytes, page_size)
    }

    /// Shared memory named in `/dev/shm`: made with `new_bytes` bytes, and refused if it is there;
    /// attached to as it is without.
    ///
    /// # Errors
    /// [`Error::Io`]: EEXIST, ENOENT, EACCES; [`Error::Argument`] for a name
    /// that is not one component; [`Error::SharedMemory`] where it does not fit.
    pub fn shared_memory(
        name: &str,
        new_bytes: Option<u64>,
        page_bytes: Option<u64>,
    ) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        let path = checked_path(name)?;
        let fail = |errno| Error::system("open", errno).of_file(Some(&path));
        if let Some(wanted) = new_bytes {
            check_size(wanted)?;
            // Else it is made, and who touches what does not fit gets SIGBUS.
            let free = sys_file::free_bytes(Path::new(SHARED_MEMORY)).map_err(fail)?;
            if wanted > free {
                let path = SHARED_MEMORY.into();
                return Err(Error::SharedMemory { operation: "open", path, wanted, free });
            }
        }
        let fd = sys_file::open_shared(&path, new_bytes.is_some()).map_err(fail)?;
        if let Some(Err(errno)) = new_bytes.map(|bytes| sys_file::truncate(fd.as_fd(), bytes)) {
            // Whoever attaches must not find what was never finished.
            sys_file::unlink(&path).map_err(fail)?;
            return Err(fail(errno));
        }
        let size_bytes = sys_file::facts(fd.as_fd()).map_err(fail)?.size_bytes;
        Self::over_memory(fd, Some(path), size_bytes, page_size)
    }

    /// Removes a name from `/dev/shm`; stores that are open keep the memory.
    ///
    /// # Errors
    /// [`Error::Io`]: ENOENT, EACCES; [`Error::Argument`] for what is no name.
    pub fn unlink_shared_memory(name: &str) -> Result<()> {
        let path = checked_path(name)?;
        sys_file::unlink(&path).map_err(|errno| Error::system("unlink", errno).of_file(Some(&path)))
    }

    fn over_memory(
        fd: OwnedFd,
        path: Option<PathBuf>,
        size_bytes: u64,
        page_size: PageSize,
    ) -> Result<Self> {
        let kind = StoreKind::Memory;
        let opened = Opened { kind, path, writable: true, fd, direct_fd: None, size_bytes };
        Self::new(opened, page_size)
    }
}
