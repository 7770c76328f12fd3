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

fn memory_error(operation: &'static str, name: Option<&str>, errno: Errno) -> Error {
    Error::system(operation, errno).of_file(name.map(path_of))
}

fn path_of(name: &str) -> PathBuf {
    Path::new(SHARED_MEMORY).join(name)
}

/// A name that is one component below `/dev/shm`, its leading slash dropped.
fn checked_name(name: &str) -> Result<&str> {
    let bare = name.strip_prefix('/').unwrap_or(name);
    if bare.is_empty() || bare == "." || bare == ".." || bare.contains(['/', '\0']) {
        return Err(Error::Argument(format!(
            "the name of a shared memory store is {name:?}; it must be one component without \
             slashes, as it names a file in /dev/shm"
        )));
    }
    Ok(bare)
}

impl Store {
    /// Anonymous shared memory of `size_bytes` bytes, all zero.
    ///
    /// # Errors
    /// [`Error::Io`] with the kernel's answer.
    pub fn memory(size_bytes: u64, page_bytes: Option<u64>) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        check_size(size_bytes)?;
        let fail = |errno| memory_error("open", None, errno);
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
        let fail = |errno| memory_error("open", None, errno);
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

    /// Shared memory named in `/dev/shm`: made (and refused if there) with
    /// `create`, which needs `size_bytes`; else attached to as it is.
    ///
    /// # Errors
    /// [`Error::Io`]: EEXIST, ENOENT, EACCES; [`Error::Argument`] for a name
    /// that is not one component, a size missing, or a size other than that of
    /// the memory attached to.
    pub fn shared_memory(
        name: &str,
        size_bytes: Option<u64>,
        create: bool,
        page_bytes: Option<u64>,
    ) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        let name = checked_name(name)?;
        if create && size_bytes.is_none() {
            return Err(Error::Argument("creating a shared memory store needs a size".into()));
        }
        check_size(size_bytes.unwrap_or(0))?;
        let fail = |errno| memory_error("open", Some(name), errno);
        if let (true, Some(wanted)) = (create, size_bytes) {
            // Else it is made, and who touches what does not fit gets SIGBUS.
            let free = sys_file::free_bytes(Path::new(SHARED_MEMORY)).map_err(fail)?;
            if wanted > free {
                let path = SHARED_MEMORY.into();
                return Err(Error::SharedMemory { operation: "open", path, wanted, free });
            }
        }
        let fd = sys_file::open_shared(&path_of(name), create).map_err(fail)?;
        if let (true, Some(size_bytes)) = (create, size_bytes) {
            if let Err(errno) = sys_file::truncate(fd.as_fd(), size_bytes) {
                // Whoever attaches must not find what was never finished.
                sys_file::unlink(&path_of(name)).map_err(fail)?;
                return Err(fail(errno));
            }
        }
        let found_bytes = sys_file::facts(fd.as_fd()).map_err(fail)?.size_bytes;
        if let Some(wanted) = size_bytes.filter(|&wanted| wanted != found_bytes) {
            return Err(Error::Argument(format!(
                "open: shared memory {name:?} has {found_bytes} bytes, not {wanted}; leave the \
                 size out to take it as it is"
            )));
        }
        Self::over_memory(fd, Some(name), found_bytes, page_size)
    }

    /// Removes a name from `/dev/shm`; stores that are open keep the memory.
    ///
    /// # Errors
    /// [`Error::Io`]: ENOENT, EACCES; [`Error::Argument`] for what is no name.
    pub fn unlink_shared_memory(name: &str) -> Result<()> {
        let name = checked_name(name)?;
        sys_file::unlink(&path_of(name)).map_err(|errno| memory_error("unlink", Some(name), errno))
    }

    fn over_memory(
        fd: OwnedFd,
        name: Option<&str>,
        size_bytes: u64,
        page_size: PageSize,
    ) -> Result<Self> {
        let path = name.map(path_of);
        let kind = StoreKind::Memory;
        let opened = Opened { kind, path, writable: true, fd, direct_fd: None, size_bytes };
        Self::new(opened, page_size)
    }
}
