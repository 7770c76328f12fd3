//! The units: page sizes, the two page coordinates, runs and selections of pages.
//!
//! A page index, a number of pages and a number of bytes are three different
//! things. Indexes are [`FilePage`] and [`WindowPage`]; counts and bytes are
//! integers whose names end in `_count` and `_bytes`.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::room::room_for;

/// An index into the pages of a store or of a window.
pub trait PageIndex: Copy + Ord + std::fmt::Debug {
    /// How messages name this coordinate.
    const COORDINATE: &'static str;
    /// The index as a plain number.
    fn get(self) -> u64;
    /// The page with this number.
    fn new(index: u64) -> Self;
    /// The page `count` pages further on.
    #[must_use]
    fn offset(self, count: u64) -> Self {
        Self::new(self.get() + count)
    }
}

macro_rules! page_index {
    ($name:ident, $coordinate:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl PageIndex for $name {
            const COORDINATE: &'static str = $coordinate;
            fn get(self) -> u64 {
                self.0
            }
            fn new(index: u64) -> Self {
                Self(index)
            }
        }
    };
}

page_index!(FilePage, "file page", "The number of a page of a store.");
page_index!(WindowPage, "window page", "The number of a page of a window.");
page_index!(Row, "row", "The number of a row of fixed size.");

/// The size of a page: a power of two, at least the system's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSize {
    shift: u32,
}

impl PageSize {
    /// The largest page that fremap maps.
    pub const MAX_BYTES: u64 = 1 << 30;

    /// A page of `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is a power of two from the system's page to 1 GiB.
    pub fn new(bytes: u64, system_page_bytes: u64) -> Result<Self> {
        if !bytes.is_power_of_two() || bytes < system_page_bytes || bytes > Self::MAX_BYTES {
            return Err(Error::Argument(format!(
                "page_bytes is {bytes}; it must be a power of two from {system_page_bytes} \
                 (the system's page) to {}",
                Self::MAX_BYTES
            )));
        }
        Ok(Self { shift: bytes.trailing_zeros() })
    }

    /// Bytes of one page.
    #[must_use]
    pub fn bytes(self) -> usize {
        1 << self.shift
    }

    /// Bytes of `page_count` pages.
    #[must_use]
    pub fn bytes_of(self, page_count: u64) -> u64 {
        page_count << self.shift
    }

    /// Pages that `bytes` bytes touch, the last perhaps in part.
    #[must_use]
    pub fn count_of(self, bytes: u64) -> u64 {
        bytes.div_ceil(1 << self.shift)
    }

    /// The page that holds byte `offset_bytes`.
    #[must_use]
    pub fn index_of(self, offset_bytes: u64) -> u64 {
        offset_bytes >> self.shift
    }
}

/// `count` pages in a row, from `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<P> {
    /// The first page.
    pub first: P,
    /// How many pages; never zero.
    pub count: u64,
}

impl<P: PageIndex> Run<P> {
    /// The page after the last.
    #[must_use]
    pub fn end(self) -> P {
        self.first.offset(self.count)
    }

    /// Every page, in order.
    pub fn pages(self) -> impl Iterator<Item = P> + Clone {
        (self.first.get()..self.first.get() + self.count).map(P::new)
    }
}

/// A checked selection of pages: every index is within its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pages<P> {
    /// Consecutive pages (perhaps none).
    Range(Range<u64>),
    /// Pages in any order, with repeats.
    List(Vec<P>),
}

impl<P: PageIndex> Pages<P> {
    /// The number of pages, repeats counted.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Range(range) => (range.end - range.start) as usize,
            Self::List(list) => list.len(),
        }
    }

    /// Whether no page is selected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The page at `position` of the selection.
    ///
    /// # Panics
    /// If `position` is not below [`len`](Self::len).
    #[must_use]
    pub fn at(&self, position: usize) -> P {
        match self {
            Self::Range(range) => {
                let index = range.start + position as u64;
                assert!(index < range.end, "position beyond the selection");
                P::new(index)
            }
            Self::List(list) => list[position],
        }
    }

    /// Every page, in order.
    pub fn iter(&self) -> impl Iterator<Item = P> + '_ {
        (0..self.len()).map(|position| self.at(position))
    }
}

/// A selection as a caller gave it, not yet checked against a limit.
#[derive(Clone, Debug)]
pub enum Selection {
    /// Every page.
    All,
    /// `start..stop`.
    Range(i64, i64),
    /// Pages in any order.
    List(Vec<i64>),
}

impl Selection {
    /// Checks every index against the `limit` of pages there are. Negative numbers of a list
    /// count from the end; those of a range are outside.
    ///
    /// # Errors
    /// [`Error::PageRange`] naming the first index outside; [`Error::Memory`].
    pub fn resolve<P: PageIndex>(&self, operation: &'static str, limit: u64) -> Result<Pages<P>> {
        let outside = |index: i64| outside(operation, P::COORDINATE, index, limit);
        match self {
            Self::All => Ok(Pages::Range(0..limit)),
            Self::Range(start, stop) if start >= stop => Ok(Pages::Range(0..0)),
            Self::Range(start, stop) => {
                let first = u64::try_from(*start).map_err(|_| outside(*start))?;
                let end = u64::try_from(*stop).map_err(|_| outside(*start))?;
                if first >= limit {
                    return Err(outside(*start));
                }
                if end > limit {
                    return Err(outside(i64::try_from(limit).unwrap_or(i64::MAX)));
                }
                Ok(Pages::Range(first..end))
            }
            Self::List(list) => resolve_list(operation, list, limit),
        }
    }
}

/// Checks every index of a list against the `limit` of pages there are; negative ones count
/// from the end.
///
/// # Errors
/// [`Error::PageRange`] naming the first index outside; [`Error::Memory`].
pub fn resolve_list<P: PageIndex>(
    operation: &'static str,
    list: &[i64],
    limit: u64,
) -> Result<Pages<P>> {
    let mut pages: Vec<P> = room_for(operation, list.len())?;
    for &index in list {
        let page = resolve_index(index, limit)
            .ok_or_else(|| outside(operation, P::COORDINATE, index, limit))?;
        pages.push(P::new(page));
    }
    Ok(Pages::List(pages))
}

/// The number that an index means, counted from the end if it is negative, if there are so many.
#[must_use]
pub fn resolve_index(index: i64, limit: u64) -> Option<u64> {
    let number = u64::try_from(index).ok().or_else(|| limit.checked_add_signed(index))?;
    (number < limit).then_some(number)
}

/// The error for an index that means nothing.
#[must_use]
pub fn outside(operation: &'static str, coordinate: &'static str, index: i64, limit: u64) -> Error {
    let least = 0_i64.saturating_sub_unsigned(limit);
    Error::PageRange { operation, coordinate, index, least, limit }
}

/// What may be done with a page. `WRITE` includes reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Prot {
    /// Nothing: a touch is SIGSEGV or SIGBUS.
    None,
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}
