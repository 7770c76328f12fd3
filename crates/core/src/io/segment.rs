//! Segments: bytes of a file and their place in memory; neighbours become one request.

use crate::sys::file::Parts;
use crate::sys::span::Span;

/// Bytes of one request through the page cache, unless a single segment has more.
pub(crate) const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Segments of one request: the kernel takes 1024 buffers, and between two segments may be one.
const MAX_SEGMENTS: usize = 512;

/// Bytes of one file, and where they belong. Sorts by where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Segment {
    /// Which of the caller's files it is.
    pub(crate) file: u32,
    /// Where the bytes begin in it.
    pub(crate) offset: u64,
    /// The caller's name for the memory.
    pub(crate) place: usize,
    /// How many bytes there are.
    pub(crate) len: u32,
}

impl Segment {
    /// The first byte of the file behind them.
    pub(crate) fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }

    fn has_bytes_of(&self, other: &Self) -> bool {
        (self.file, self.offset, self.len) == (other.file, other.offset, other.len)
    }
}

/// Joins sorted segments, as many from the front as one request can move, and adds their memory
/// to `parts`. Says how many they are. Where bytes are wanted in several places they are moved
/// once; `repeat` is told of each further segment and of the one that has its bytes. Up to
/// `gap.len()` bytes between two segments are read into `gap`.
pub(crate) fn join<'m>(
    segments: &[Segment],
    memory: impl Fn(&Segment) -> Span<'m>,
    gap: Option<Span<'m>>,
    parts: &mut Parts<'m>,
    mut repeat: impl FnMut(&Segment, &Segment),
) -> usize {
    let first = &segments[0];
    let (mut last, mut joined) = (first, 1);
    parts.push(memory(first));
    for (index, next) in segments.iter().enumerate().skip(1) {
        if next.has_bytes_of(last) {
            repeat(last, next);
            continue;
        }
        let between = next.offset.checked_sub(last.end());
        let joins = next.file == first.file
            && between.is_some_and(|bytes| bytes <= gap.map_or(0, |gap| gap.len() as u64))
            && next.end() - first.offset <= MAX_REQUEST_BYTES as u64
            && joined < MAX_SEGMENTS;
        if !joins {
            return index;
        }
        if let (Some(gap), Some(bytes @ 1..)) = (gap, between) {
            parts.push(gap.part(0, bytes as usize));
        }
        parts.push(memory(next));
        (last, joined) = (next, joined + 1);
    }
    segments.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn segment(file: u32, offset: u64, len: u32, place: usize) -> Segment {
        Segment { file, offset, place, len }
    }

    /// How many segments one request moves, the lengths of its buffers, and what is repeated.
    fn joined(
        segments: &[Segment],
        gap_bytes: Option<usize>,
    ) -> (usize, Vec<usize>, Vec<(usize, usize)>) {
        let mut memory = vec![0; 2 * MAX_REQUEST_BYTES];
        let mut gap = vec![0; gap_bytes.unwrap_or(0)];
        let (memory, gap) = (Span::of(&mut memory), Span::of(&mut gap));
        let (mut parts, mut repeats) = (Parts::default(), Vec::new());
        let count = join(
            segments,
            |segment| memory.part(segment.place, segment.len as usize),
            gap_bytes.map(|_| gap),
            &mut parts,
            |from, to| repeats.push((from.place, to.place)),
        );
        (count, parts.vector().iter().map(|part| part.iov_len).collect(), repeats)
    }

    #[test]
    fn neighbours_of_one_file_are_one_request() {
        let segments = [segment(1, 10, 5, 100), segment(1, 15, 5, 0), segment(2, 20, 5, 50)];
        assert_eq!(joined(&segments, None), (2, vec![5, 5], vec![]));
        assert_eq!(joined(&segments[2..], None), (1, vec![5], vec![]));
    }

    #[test]
    fn neighbours_in_memory_too_are_one_buffer() {
        let segments = [segment(0, 10, 5, 100), segment(0, 15, 5, 105)];
        assert_eq!(joined(&segments, None), (2, vec![10], vec![]));
    }

    #[test]
    fn bytes_between_two_are_read_where_that_is_allowed() {
        let segments = [segment(0, 0, 5, 0), segment(0, 12, 5, 100)];
        assert_eq!(joined(&segments, None).0, 1);
        assert_eq!(joined(&segments, Some(6)).0, 1);
        assert_eq!(joined(&segments, Some(7)), (2, vec![5, 7, 5], vec![]));
    }

    #[test]
    fn what_is_wanted_twice_is_moved_once() {
        let twice = [segment(0, 0, 5, 0), segment(0, 0, 5, 50), segment(0, 5, 5, 70)];
        assert_eq!(joined(&twice, None), (3, vec![5, 5], vec![(0, 50)]));
        // Fewer of the same bytes are another segment.
        let fewer = [segment(0, 0, 5, 0), segment(0, 0, 4, 50)];
        assert_eq!(joined(&fewer, None).0, 1);
    }

    #[test]
    fn a_request_has_a_limit_in_bytes_and_in_buffers() {
        let half = MAX_REQUEST_BYTES as u32 / 2;
        let segments: Vec<_> = (0..3).map(|n| segment(0, u64::from(half) * n, half, 0)).collect();
        assert_eq!(joined(&segments, None).0, 2);
        let one = segment(0, 0, 2 * MAX_REQUEST_BYTES as u32, 0);
        assert_eq!(joined(&[one], None).0, 1);
        let many: Vec<_> = (0..600).map(|n| segment(0, 2 * n, 1, 3 * n as usize)).collect();
        let (count, buffers, _) = joined(&many, Some(1));
        assert_eq!((count, buffers.len()), (512, 1023));
    }
}
