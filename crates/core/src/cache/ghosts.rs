//! File pages that were evicted recently, remembered without their content.
//!
//! A ghost is 16 bits of a hash, in a bucket that another part of the hash chooses. A full bucket
//! drops its oldest ghost for a new one. Rarely (one in some thousands), one page is taken for
//! another. That does no harm: the page is protected without having earned it.

use rustix::io::Errno;

use crate::room::Zeros;
use crate::units::FilePage;

/// Ghosts of a bucket: half a cache line.
const BUCKET: usize = 16;

/// A set of about as many pages as it was made for, the oldest forgotten first.
#[derive(Debug)]
pub struct Ghosts {
    /// Buckets in a row, each with its newest first; 0 is no ghost.
    marks: Zeros<u16>,
}

impl Ghosts {
    /// Room for `count` ghosts, rounded up to a bucket.
    pub fn new(count: usize) -> Result<Self, Errno> {
        Ok(Self { marks: Zeros::new(count.div_ceil(BUCKET).max(1) * BUCKET)? })
    }

    /// How many it remembers at most.
    pub fn limit(&self) -> usize {
        self.marks.len()
    }

    /// Bytes that it occupies.
    pub fn bytes(&self) -> usize {
        self.marks.len() * size_of::<u16>()
    }

    fn bucket(&mut self, page: FilePage) -> (&mut [u16], u16) {
        let hash = mix(page.0);
        let first = below(hash, self.marks.len() / BUCKET) * BUCKET;
        let mark = ((hash & 0xffff) as u16).max(1);
        (&mut self.marks[first..first + BUCKET], mark)
    }

    /// Remembers a page that leaves.
    pub fn remember(&mut self, page: FilePage) {
        let (bucket, mark) = self.bucket(page);
        bucket.copy_within(..BUCKET - 1, 1);
        bucket[0] = mark;
    }

    /// Whether a page is remembered. It is forgotten with the answer.
    pub fn take(&mut self, page: FilePage) -> bool {
        let (bucket, mark) = self.bucket(page);
        let Some(index) = bucket.iter().position(|&other| other == mark) else {
            return false;
        };
        bucket.copy_within(index + 1.., index);
        bucket[BUCKET - 1] = 0;
        true
    }
}

/// Spreads numbers that are close together (the end of `SplitMix64`).
pub fn mix(number: u64) -> u64 {
    let word = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A number below `limit` (at most 2^32) from the upper half of a hash.
pub fn below(hash: u64, limit: usize) -> usize {
    (((hash >> 32) * limit as u64) >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_remembered_until_it_is_asked_for() {
        let mut ghosts = Ghosts::new(100).unwrap();
        ghosts.remember(FilePage(7));
        ghosts.remember(FilePage(9));
        assert!(!ghosts.take(FilePage(8)));
        assert!(ghosts.take(FilePage(7)));
        assert!(!ghosts.take(FilePage(7)));
        assert!(ghosts.take(FilePage(9)));
    }

    #[test]
    fn the_oldest_are_forgotten_and_few_are_mistaken() {
        let mut ghosts = Ghosts::new(4096).unwrap();
        assert_eq!((ghosts.limit(), ghosts.bytes()), (4096, 8192));
        for page in 0..100_000 {
            ghosts.remember(FilePage(page));
        }
        let remembered = |ghosts: &mut Ghosts, pages: std::ops::Range<u64>| {
            pages.filter(|&page| ghosts.take(FilePage(page))).count()
        };
        assert!(remembered(&mut ghosts, 98_000..100_000) > 1900, "half of the room");
        assert!(remembered(&mut ghosts, 0..50_000) < 100, "older by ten times the room");
    }
}
