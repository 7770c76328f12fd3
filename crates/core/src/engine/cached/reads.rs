//! Reads for faults: which pages are being read, and how many to read at once.
//!
//! If a fault follows the pages that the last one read, reads run forwards: the next read is twice
//! as long, up to a cluster. A fault elsewhere reads only its page. After a whole cluster, the
//! service reads ahead while no fault waits.

use crate::units::{PageIndex, Run, WindowPage};

/// Reads for faults of a window that may be under way at once.
pub const MAX_READS: usize = 64;
/// Clusters behind a fault that are read ahead of the next.
const CLUSTERS_AHEAD: u64 = 4;
/// Forward runs of faults that are followed separately.
const STREAMS: usize = 8;

/// One read. It may be out of date: a call has changed a page since it began.
#[derive(Clone, Copy, Debug, Default)]
struct Read {
    taken: bool,
    /// None when it is out of date.
    run: Option<Run<WindowPage>>,
}

/// Which read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadIndex(pub usize);

/// The reads for faults that are under way. Allocates nothing.
#[derive(Debug)]
pub struct Reads {
    all: [Read; MAX_READS],
    /// Those that are not out of date.
    current: usize,
    /// None from here on is taken.
    end: usize,
    streams: Streams,
    /// The pages to read ahead of faults, unless a call changes one of them.
    ahead: Option<Run<WindowPage>>,
}

impl Default for Reads {
    fn default() -> Self {
        let (all, streams) = ([Read::default(); MAX_READS], Streams::default());
        Self { all, current: 0, end: 0, streams, ahead: None }
    }
}

impl Reads {
    /// A read for `run` begins; None while `most` are under way.
    pub fn begin(&mut self, run: Run<WindowPage>, most: usize) -> Option<ReadIndex> {
        let free = self.all[..most].iter().position(|read| !read.taken)?;
        self.all[free] = Read { taken: true, run: Some(run) };
        self.current += 1;
        self.end = self.end.max(free + 1);
        Some(ReadIndex(free))
    }

    /// Whether no call has changed a page of it since it began.
    pub fn is_current(&self, read: ReadIndex) -> bool {
        self.all[read.0].run.is_some()
    }

    /// A read is over.
    pub fn end(&mut self, read: ReadIndex) {
        self.current -= usize::from(self.all[read.0].run.is_some());
        self.all[read.0] = Read::default();
        while self.end > 0 && !self.all[self.end - 1].taken {
            self.end -= 1;
        }
    }

    /// Whether a page is being read.
    pub fn reads(&self, page: WindowPage) -> bool {
        self.current > 0
            && self.all[..self.end].iter().any(|read| read.run.is_some_and(|r| holds(r, page)))
    }

    /// Reads in progress for `page` are out of date.
    pub(super) fn outdate(&mut self, page: WindowPage) {
        if self.ahead.is_some_and(|run| holds(run, page)) {
            self.ahead = None;
        }
        if self.current == 0 {
            return;
        }
        for read in &mut self.all[..self.end] {
            if read.run.is_some_and(|run| holds(run, page)) {
                read.run = None;
                self.current -= 1;
            }
        }
    }

    /// How many pages to read for a fault on `page`, of at most `most`.
    pub fn length(&self, page: WindowPage, most: u64) -> u64 {
        self.streams.length(page, most)
    }

    /// Pages were read for a fault on the first of them, or ahead of it.
    pub fn note(&mut self, run: Run<WindowPage>) {
        self.streams.note(run);
    }

    /// A fault was served by reading `run`: where that is a whole cluster, what is behind it
    /// is read ahead, in a window of `page_count` pages.
    pub fn plan_ahead(&mut self, run: Run<WindowPage>, cluster_pages: u64, page_count: u64) {
        if run.count == cluster_pages && cluster_pages > 1 {
            let left = page_count - run.end().0;
            let count = left.min(CLUSTERS_AHEAD * cluster_pages);
            self.ahead = (count > 0).then_some(Run { first: run.end(), count });
        }
    }

    /// The pages to read ahead.
    pub fn ahead(&self) -> Option<Run<WindowPage>> {
        self.ahead
    }

    /// Its first `count` pages were read.
    pub fn advance(&mut self, count: u64) {
        let left = self.ahead.filter(|run| run.count > count);
        self.ahead = left.map(|Run { first, count: all }| Run {
            first: first.offset(count),
            count: all - count,
        });
    }

    /// Nothing is to be read ahead.
    pub fn stop_ahead(&mut self) {
        self.ahead = None;
    }
}

fn holds(run: Run<WindowPage>, page: WindowPage) -> bool {
    run.first <= page && page < run.end()
}

/// The runs of pages that were read for faults of late.
#[derive(Debug, Default)]
struct Streams {
    runs: [Option<Run<WindowPage>>; STREAMS],
    oldest: usize,
}

impl Streams {
    fn find(&self, page: WindowPage) -> Option<usize> {
        self.runs.iter().position(|run| run.is_some_and(|run| run.end() == page))
    }

    fn length(&self, page: WindowPage, most: u64) -> u64 {
        let before = self.find(page).and_then(|stream| self.runs[stream]);
        before.map_or(1, |run| 2 * run.count).min(most)
    }

    fn note(&mut self, run: Run<WindowPage>) {
        let stream = self.find(run.first).unwrap_or_else(|| {
            self.oldest = (self.oldest + 1) % STREAMS;
            self.oldest
        });
        self.runs[stream] = Some(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> Run<WindowPage> {
        Run { first: WindowPage(first), count }
    }

    #[test]
    fn reads_get_longer_while_faults_run_forwards() {
        let mut reads = Reads::default();
        let (mut page, mut lengths) = (100, Vec::new());
        for _ in 0..9 {
            let length = reads.length(WindowPage(page), 64);
            reads.note(run(page, length));
            page += length;
            lengths.push(length);
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        assert_eq!(reads.length(WindowPage(5000), 64), 1, "a jump");
        assert_eq!(reads.length(WindowPage(page - 1), 64), 1, "backwards");
    }

    #[test]
    fn several_runs_are_told_apart() {
        let mut reads = Reads::default();
        for step in 0..3 {
            for stream in 0..STREAMS as u64 {
                let page = 1000 * stream + (1 << step) - 1;
                let length = reads.length(WindowPage(page), 64);
                assert_eq!(length, 1 << step, "stream {stream}");
                reads.note(run(page, length));
            }
        }
    }

    #[test]
    fn a_page_that_changes_outdates_its_read_alone() {
        let mut reads = Reads::default();
        let first = reads.begin(run(10, 4), MAX_READS).expect("free");
        let second = reads.begin(run(20, 1), MAX_READS).expect("free");
        assert!(reads.reads(WindowPage(13)) && !reads.reads(WindowPage(14)));
        reads.outdate(WindowPage(14));
        assert!(reads.is_current(first));
        reads.outdate(WindowPage(12));
        assert!(!reads.is_current(first) && reads.is_current(second));
        assert!(!reads.reads(WindowPage(13)), "read anew for whoever comes");
        reads.end(first);
        reads.end(second);
        assert_eq!(reads.current, 0);
    }

    #[test]
    fn what_is_behind_a_whole_cluster_is_read_ahead() {
        let mut reads = Reads::default();
        reads.plan_ahead(run(10, 32), 64, 1000);
        assert_eq!(reads.ahead(), None, "no whole cluster");
        reads.plan_ahead(run(100, 64), 64, 1000);
        assert_eq!(reads.ahead(), Some(run(164, 64 * CLUSTERS_AHEAD)));
        reads.advance(64);
        assert_eq!(reads.ahead(), Some(run(228, 64 * (CLUSTERS_AHEAD - 1))));
        reads.outdate(WindowPage(227));
        assert!(reads.ahead().is_some(), "that page was read");
        reads.outdate(WindowPage(228));
        assert_eq!(reads.ahead(), None, "a call has changed what is behind");
        reads.plan_ahead(run(900, 64), 64, 1000);
        assert_eq!(reads.ahead(), Some(run(964, 36)), "up to the end of the window");
        reads.advance(36);
        assert_eq!(reads.ahead(), None);
        reads.plan_ahead(run(936, 64), 64, 1000);
        assert_eq!(reads.ahead(), None, "the end of the window");
        reads.plan_ahead(run(100, 1), 1, 1000);
        assert_eq!(reads.ahead(), None, "pages as large as a cluster");
    }

    #[test]
    fn a_read_that_is_out_of_date_keeps_its_place_until_it_ends() {
        let mut reads = Reads::default();
        let all: Vec<_> = (0..8).map(|page| reads.begin(run(page, 1), 8).expect("free")).collect();
        assert_eq!(reads.begin(run(99, 1), 8), None);
        reads.outdate(WindowPage(3));
        assert_eq!(reads.begin(run(99, 1), 8), None);
        assert_eq!(reads.begin(run(98, 1), 9), Some(ReadIndex(8)));
        reads.end(all[3]);
        assert_eq!(reads.begin(run(99, 1), 8), Some(all[3]));
        assert!(reads.reads(WindowPage(98)) && reads.reads(WindowPage(99)));
    }
}
