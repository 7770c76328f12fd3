//! Arrays of zeros of a fixed length, whose memory costs nothing until it is used.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use rustix::io::Errno;

use super::mm::{system_page_bytes, Access, Advice, Region};
use super::reserve;

/// Shorter arrays come from the allocator: a mapping of their own would cost more.
const LEAST_MAPPED_BYTES: usize = 64 << 10;

/// Integers.
///
/// # Safety
/// Any bytes are a value, zeros are the default one, and there is nothing to drop.
pub unsafe trait Integer: Copy + Default + std::fmt::Debug {}

macro_rules! integers {
    ($($name:ty)*) => {$(
        // SAFETY: an integer.
        unsafe impl Integer for $name {}
    )*};
}
integers!(u8 u16 u32 u64 u128 i64);

/// An array that begins as zeros. All of its address range is there from the start, so that
/// nothing which is put into it later allocates; the kernel backs a page when it is first used.
#[derive(Debug)]
pub struct Zeros<T> {
    memory: Memory<T>,
    len: usize,
}

#[derive(Debug)]
enum Memory<T> {
    Heap(Vec<T>),
    Mapped(Region, PhantomData<T>),
}

impl<T: Integer> Zeros<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(len: usize) -> Result<Self, Errno> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(Errno::NOMEM)?;
        let memory = if bytes < LEAST_MAPPED_BYTES {
            let mut zeros: Vec<T> = Vec::new();
            zeros.try_reserve_exact(len).map_err(|_| Errno::NOMEM)?;
            // The reserve is not for what may be refused, and what stays.
            if reserve::has(zeros.as_ptr().cast()) {
                return Err(Errno::NOMEM);
            }
            zeros.resize(len, T::default());
            Memory::Heap(zeros)
        } else {
            let whole_pages = bytes.checked_next_multiple_of(system_page_bytes());
            let bytes = whole_pages.ok_or(Errno::NOMEM)?;
            let region = Region::anonymous(bytes, align_of::<T>(), Access::Write)?;
            // One word that is used would be backed by 2 MiB. A kernel that cannot do that
            // refuses the advice, and needs none.
            let _small = region.advise(0, bytes, Advice::NoHugePage);
            Memory::Mapped(region, PhantomData)
        };
        Ok(Self { memory, len })
    }
}

impl<T> Default for Zeros<T> {
    /// None.
    fn default() -> Self {
        Self { memory: Memory::Heap(Vec::new()), len: 0 }
    }
}

impl<T: Integer> Deref for Zeros<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::Heap(zeros) => zeros,
            // SAFETY: `new` has mapped as many integers, aligned to pages, which began as
            // zeros; nobody else knows the region, and it stays mapped while it is borrowed.
            Memory::Mapped(region, _) => unsafe {
                std::slice::from_raw_parts(region.start().cast::<T>(), self.len)
            },
        }
    }
}

impl<T: Integer> DerefMut for Zeros<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Heap(zeros) => zeros,
            // SAFETY: as above, and it is borrowed for this alone.
            Memory::Mapped(region, _) => unsafe {
                std::slice::from_raw_parts_mut(region.start().cast::<T>(), self.len)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_any_length_begin_as_zeros_and_keep_what_is_put_in() {
        for len in [0, 1, LEAST_MAPPED_BYTES / 8 - 1, LEAST_MAPPED_BYTES / 8, 1 << 20] {
            let mut zeros = Zeros::<u64>::new(len).unwrap();
            assert_eq!(zeros.len(), len);
            assert!(zeros.iter().step_by(511).all(|&word| word == 0));
            if let Some(last) = zeros.last_mut() {
                *last = 7;
                assert_eq!(zeros[len - 1], 7);
            }
        }
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        assert_eq!(Zeros::<u128>::new(usize::MAX / 2).unwrap_err(), Errno::NOMEM);
        assert_eq!(Zeros::<u16>::new(1 << 56).unwrap_err(), Errno::NOMEM);
    }
}
