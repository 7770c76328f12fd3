//! Memory and descriptors that Python passes: all `unsafe` of the binding.
//!
//! A buffer is held (pinned, in Python's sense) as long as its [`Bytes`] exists, so its memory
//! stays where it is. Its content may change at any time, so no reference points into it.

#![allow(unsafe_code)]

use std::ffi::{c_int, CStr};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use fremap_core::sys::mm::{system_page_bytes, Region};
use fremap_core::sys::span::Span;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use rustix::io::Errno;

/// A contiguous buffer that Python owns.
pub struct Bytes {
    buffer: PyUntypedBuffer,
}

impl Bytes {
    /// Holds a buffer that will only be read.
    pub fn readable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if has_objects(buffer.format()) {
            return Err(PyTypeError::new_err("the buffer must not hold Python objects"));
        }
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer must be C-contiguous"));
        }
        Ok(Self { buffer })
    }

    /// Holds a buffer that will be written.
    pub fn writable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let bytes = Self::readable(object)?;
        if bytes.buffer.readonly() {
            return Err(PyBufferError::new_err("the buffer must be writable"));
        }
        Ok(bytes)
    }

    /// The memory. Of a buffer taken by [`readable`](Self::readable) it is only
    /// to be read.
    pub fn span(&self) -> Span<'_> {
        // SAFETY: the exporter keeps the memory mapped until the buffer is
        // released, which the borrow prevents. Nothing here makes a reference
        // into it, and callers write only through buffers taken by `writable`.
        unsafe { Span::new(self.buffer.buf_ptr().cast(), self.buffer.len_bytes()) }
    }
}

/// The region that a buffer is, which its exporter has mapped and unmaps. The caller keeps
/// the buffer as long as the region, which is more than the compiler can see.
pub fn mapped_by(memory: &Bytes) -> Result<Region, Errno> {
    let span = memory.span();
    let page = system_page_bytes();
    // SAFETY: the exporter keeps the memory mapped until the buffer is released, which the
    // caller does after it has dropped the region; it is a mapping of the caller's own making,
    // of which nobody has a reference.
    unsafe { Region::adopted(span.start(), span.len().next_multiple_of(page)) }
}

/// Whether a buffer's format (PEP 3118) has an object in it, whose pointer must not be
/// written as bytes. The package refuses such memory earlier, with the argument's name.
fn has_objects(format: &CStr) -> bool {
    // Names of fields stand between colons.
    format.to_bytes().split(|&byte| byte == b':').step_by(2).any(|part| part.contains(&b'O'))
}

/// A descriptor of the core's own for the file that `fd` refers to.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the caller names a descriptor of the process; it is used for this
    // one call, which fails with EBADF where it is not open.
    rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 3)
}

/// Describes `memory` in `view`, as one-dimensional bytes owned by `owner`.
///
/// # Safety
/// `view` is the pointer that the interpreter passed to `bf_getbuffer`, and
/// `memory` stays mapped until the interpreter releases it.
pub unsafe fn fill_view(
    view: *mut ffi::Py_buffer,
    owner: &Bound<'_, PyAny>,
    memory: Span<'_>,
    writable: bool,
    flags: c_int,
) -> PyResult<()> {
    // SAFETY: the caller vouches for the view and the memory; the call takes a
    // reference to the owner, or sets an exception and leaves the view empty.
    let answer = unsafe {
        ffi::PyBuffer_FillInfo(
            view,
            owner.as_ptr(),
            memory.start().cast(),
            ffi::Py_ssize_t::try_from(memory.len()).expect("mappings are below 2^63 bytes"),
            c_int::from(!writable),
            flags,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(PyErr::fetch(owner.py()))
    }
}
