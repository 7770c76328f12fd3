//! Frames outside a window, in memory whose frames "move" by copying.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::engine::cached::frames::Before;
use crate::sys::mm::is_present;

/// A window of plain memory.
#[derive(Debug)]
struct Memory {
    region: Region,
    tracking: Option<Tracking>,
    /// The kernel moves nothing.
    refuses: AtomicBool,
}

impl Memory {
    fn new(tracking: Option<Tracking>) -> Self {
        let region = Region::anonymous(1024 * system_page_bytes(), 1, Access::Write);
        Self { region: region.expect("memory"), tracking, refuses: AtomicBool::new(false) }
    }

    fn fill_pages(&self, byte: u8, offset: usize, len: usize) {
        self.region.span(offset, len).copy_from(&vec![byte; len]);
    }

    /// What a range of the window holds, if it is present and the same everywhere.
    fn byte_at(&self, offset: usize, len: usize) -> u8 {
        let content = self.region.span(offset, len).to_vec();
        assert!(content.iter().all(|byte| *byte == content[0]));
        content[0]
    }
}

impl Frames for Memory {
    fn region(&self) -> &Region {
        &self.region
    }

    fn locked(&self) -> bool {
        false
    }

    fn tracking(&self) -> Option<Tracking> {
        self.tracking
    }

    fn userfault(&self) -> Option<&dyn Userfault> {
        Some(self)
    }

    fn fill(
        &self,
        _: usize,
        _: Span<'_>,
        _: Option<Span<'_>>,
        _: Before,
        _: bool,
    ) -> Result<Filled, Partial> {
        unreachable!("the pool fills no window")
    }

    fn drop_pages(&self, _: &[(usize, usize)]) -> Result<(), Errno> {
        unreachable!("the pool drops no page of a window")
    }

    fn deny(&self, _: &[(usize, usize)]) -> Result<(), Errno> {
        unreachable!("the pool knows no access")
    }

    fn allow(&self, _: &[(usize, usize)]) -> Result<(), Errno> {
        unreachable!("the pool knows no access")
    }
}

impl Userfault for Memory {
    fn adopt_staging(&self, _: &mut Region, _: usize) -> Result<bool, Errno> {
        Ok(self.tracking.is_none())
    }

    fn adopt_isolated(&self, _: &mut Region) -> Result<(), Errno> {
        Ok(())
    }

    fn reuses(&self) -> bool {
        self.tracking.is_some()
    }

    fn move_frames(&self, offset: usize, from: Span<'_>) -> Result<Filled, Partial> {
        let moved = self.shift(self.region.span(offset, from.len()), from);
        let stopped = Partial { done_bytes: 0, errno: Errno::BUSY };
        moved.then_some(Filled::Moved).ok_or(stopped)
    }

    fn move_out(&self, offset: usize, to: Span<'_>) -> Result<(), Errno> {
        let moved = self.shift(to, self.region.span(offset, to.len()));
        moved.then_some(()).ok_or(Errno::BUSY)
    }

    fn move_back(&self, _: usize, _: Span<'_>) -> Result<(), Errno> {
        unreachable!("the pool brings nothing back")
    }

    fn shift(&self, to: Span<'_>, from: Span<'_>) -> bool {
        let refuses = self.refuses.load(Ordering::Relaxed);
        if !refuses {
            to.copy_span(from);
        }
        !refuses
    }

    fn has(&self, _: Span<'_>) -> Result<bool, Errno> {
        unreachable!("the pool looks for no page")
    }

    fn notice_writes(&self, _: &[(usize, usize)]) -> Result<(), Errno> {
        unreachable!("the pool tracks nothing")
    }

    fn written(
        &self,
        _: usize,
        _: usize,
        _: bool,
        _: &mut Vec<(usize, usize)>,
    ) -> Result<(), Errno> {
        unreachable!("the pool tracks nothing")
    }

    fn wake(&self, _: &[(usize, usize)]) {
        unreachable!("nobody waits for the pool")
    }

    fn reclaims_page_tables(&self) -> bool {
        false
    }
}

fn page_size() -> PageSize {
    let bytes = system_page_bytes() as u64;
    PageSize::new(bytes, bytes).expect("the system's")
}

/// The byte that pages hold.
fn byte_of(content: Span<'_>) -> u8 {
    content.to_vec()[0]
}

/// Frames in spare memory would not be counted, and be in the way of the next ones.
#[test]
fn memory_that_was_read_into_for_nothing_does_not_become_spare() {
    let (memory, page) = (Memory::new(None), system_page_bytes());
    let ring = Staging::new(&memory, page_size(), 64).expect("memory");
    let first = ring.read_into(0, 8 * page);
    assert!(ring.exchange(0, 8 * page), "all that was read has gone");
    assert_ne!(ring.front(0).start(), first.start());
    // A call that fails completes nothing of what it has read.
    ring.read_into(0, 20 * page);
    ring.read_into(0, 8 * page);
    assert!(!ring.exchange(0, 8 * page), "12 pages are left in front");
    ring.read_into(0, 20 * page);
    assert!(ring.exchange(0, 20 * page));
}

#[test]
fn spare_memory_is_empty_after_a_chunk_however_it_was_put() {
    let (memory, page) = (Memory::new(None), system_page_bytes());
    let ring = Staging::new(&memory, page_size(), 64).expect("memory");
    for (all_moved, refuses) in [(false, false), (true, false), (true, true)] {
        memory.refuses.store(refuses, Ordering::Relaxed);
        // More than is used: front and spare memory cannot change places.
        ring.read_into(0, 20 * page).clear();
        let spare = ring.spare(0).expect("pages move").part(0, 8 * page);
        spare.copy_from(&vec![7; 8 * page]);
        ring.recycle(&memory, 0, 8 * page, all_moved);
        let left = if all_moved && !refuses { 7 } else { 0 };
        assert_eq!(byte_of(ring.front(0)), left, "{all_moved} {refuses}");
        if left == 0 {
            assert_eq!(is_present(spare.part(0, page)), Ok(false), "{all_moved} {refuses}");
        }
    }
}

#[test]
fn elements_have_staging_memory_of_their_own_and_all_is_told() {
    let memory = Memory::new(None);
    let mut pool = FramePool::new(page_size(), 512);
    let (told, element_pages) = (pool.staging_bytes(), ELEMENT_BYTES / system_page_bytes());
    let mut bytes = Vec::new();
    for count in [1, element_pages, element_pages + 1, 512] {
        let (ring, _) = pool.for_loading(&memory, count).expect("memory");
        let chunk_pages = ring.chunk_pages();
        bytes.push((chunk_pages, told.load(Ordering::Relaxed)));
    }
    let large = (CHUNKS_IN_FLIGHT * 512 * system_page_bytes() + ELEMENT_BYTES) as u64;
    let small = (element_pages, ELEMENT_BYTES as u64);
    assert_eq!(bytes, [small, small, (512, large), (512, large)]);
}

/// A window without a budget has none, nor has a call of a window that is only read.
#[test]
fn without_memory_for_frames_no_run_is_taken() {
    let memory = Memory::new(None);
    let mut isolated = IsolatedFrames::default();
    assert_eq!(isolated.take_run(&memory, (0, memory.region.len())), 0);
    assert!(isolated.made().is_none());
}

#[test]
fn frames_of_runs_go_round() {
    let (memory, page) = (Memory::new(None), system_page_bytes());
    let mut isolated = IsolatedFrames::of_runs(&memory, page_size(), 64).expect("memory");
    memory.fill_pages(1, 0, 128 * page);
    assert_eq!(isolated.take_run(&memory, (0, (LEAST_RUN - 1) * page)), 0, "dropped sooner");
    assert_eq!(isolated.take_run(&memory, (0, 40 * page)), 40 * page);
    assert_eq!(isolated.take_run(&memory, (40 * page, 60 * page)), 24 * page, "as fits");
    assert_eq!(isolated.take_run(&memory, (64 * page, 60 * page)), 0, "all is full");
    let stack = isolated.made().expect("it is made");
    let frames = stack.memory_for_run(16 * page).expect("64 pages are free");
    frames.copy_from(&vec![2; 16 * page]);
    assert_eq!(stack.put(&memory, 512 * page, 16 * page).ok(), Some(Filled::Moved));
    assert_eq!(memory.byte_at(512 * page, 16 * page), 2);
    assert_eq!(stack.free_bytes, 48 * page);
}

#[test]
fn what_the_kernel_does_not_move_leaves_no_frames_behind() {
    let (memory, page) = (Memory::new(None), system_page_bytes());
    let mut isolated = IsolatedFrames::of_runs(&memory, page_size(), 64).expect("memory");
    memory.fill_pages(1, 0, 32 * page);
    assert_eq!(isolated.take_run(&memory, (0, 32 * page)), 32 * page);
    memory.refuses.store(true, Ordering::Relaxed);
    assert_eq!(isolated.take_run(&memory, (32 * page, 32 * page)), 0);
    let stack = isolated.made().expect("it is made");
    assert_eq!(stack.free_bytes, 32 * page, "those from before");
    stack.memory_for_run(16 * page).expect("32 pages are free").copy_from(&vec![2; 16 * page]);
    assert!(stack.put(&memory, 0, 16 * page).is_err());
    assert_eq!(stack.free_bytes, 16 * page);
    let emptied = stack.region.span(16 * page, page);
    assert_eq!(is_present(emptied), Ok(false));
}

/// Most of a run's memory has to have frames: filling the rest would fault.
#[test]
fn a_run_is_read_into_free_frames_if_there_are_enough() {
    let (memory, page) = (Memory::new(None), system_page_bytes());
    let mut isolated = IsolatedFrames::of_runs(&memory, page_size(), 64).expect("memory");
    assert_eq!(isolated.take_run(&memory, (0, 16 * page)), 16 * page);
    let stack = isolated.made().expect("it is made");
    let lengths: Vec<usize> = [LEAST_RUN - 1, LEAST_RUN, 31, 32, 64]
        .into_iter()
        .filter(|pages| stack.memory_for_run(pages * page).is_some())
        .collect();
    assert_eq!(lengths, [LEAST_RUN, 31]);
}

#[test]
fn pages_are_isolated_above_the_frames_that_are_kept() {
    let (memory, page) = (Memory::new(Some(Tracking::Kernel)), system_page_bytes());
    let mut isolated = IsolatedFrames::default();
    let stack = isolated.ready(&memory, page_size()).expect("memory");
    let batch = stack.page_count();
    assert_eq!(batch, ISOLATED_BYTES / page);
    for round in 1..=2_u8 {
        memory.fill_pages(round, 0, batch * page);
        for slot in 0..batch {
            stack.copy(slot, memory.region.span(slot * page, page));
        }
        memory.fill_pages(9, page, page);
        memory.move_out(0, stack.contents(0, batch)).expect("moved");
        let changed: Vec<usize> = (0..batch).filter(|&slot| stack.differs(slot)).collect();
        assert_eq!(changed, [1], "stored to since it was copied");
        assert!(stack.keep(batch), "1024 pages have room");
    }
    assert_eq!(stack.free_bytes, 2 * batch * page);
    let (first, last) = (stack.last(2 * batch * page), stack.last(page));
    assert_eq!(first.map(byte_of), Some(1));
    assert_eq!(last.map(byte_of), Some(2));
    assert!(stack.last((2 * batch + 1) * page).is_none(), "not as many");
    // Those of a call that needs them no more go.
    let memory_of = stack.region.span(0, page);
    assert_eq!(is_present(memory_of), Ok(true));
    isolated.free_kept();
    let stack = isolated.made().expect("it is made");
    assert_eq!((stack.free_bytes, is_present(stack.region.span(0, page))), (0, Ok(false)));
}

/// There is always room to isolate the next batch.
#[test]
fn no_more_frames_are_kept_than_leave_room_for_a_batch() {
    let (memory, page) = (Memory::new(Some(Tracking::Kernel)), system_page_bytes());
    let mut isolated = IsolatedFrames::default();
    let stack = isolated.ready(&memory, page_size()).expect("memory");
    let batch = stack.page_count();
    while stack.keep(batch) {
        assert!(stack.free_bytes + batch * page <= stack.region.len());
    }
    assert_eq!(stack.free_bytes, memory.region.len());
    // One more page than the memory has cannot be taken.
    assert!(stack.take(batch * page, |_| Ok(())).is_ok());
    assert_eq!(stack.take(page, |_| Ok(())), Err(Errno::NOMEM));
}

#[test]
fn memory_that_could_not_be_emptied_is_not_used_again() {
    let (memory, page) = (Memory::new(Some(Tracking::Kernel)), system_page_bytes());
    let mut isolated = IsolatedFrames::of_pages(&memory, page_size()).expect("memory");
    let stack = isolated.made().expect("it is made");
    stack.content(0).copy_from(&vec![7; page]);
    stack.fouled = true;
    assert!(isolated.made().is_none());
    let stack = isolated.ready(&memory, page_size()).expect("memory");
    assert_eq!(is_present(stack.content(0)), Ok(false), "it is other memory");
    // Faults that want frames of runs try to empty theirs, and go on with it.
    let mut runs = IsolatedFrames::of_runs(&memory, page_size(), 64).expect("memory");
    runs.made().expect("it is made").fouled = true;
    assert_eq!(runs.take_run(&memory, (0, 64 * page)), 64 * page);
}

/// A budget counts the frames outside the window in advance.
#[test]
fn what_a_budget_sets_aside_is_what_the_memory_has() {
    let page = page_size();
    let (chunk_pages, cluster_pages) = (256_u64, 64_u64);
    for tracking in [None, Some(Tracking::Kernel), Some(Tracking::Faults)] {
        let memory = Memory::new(tracking);
        let mut pool = FramePool::new(page, chunk_pages as usize);
        for count in [1, chunk_pages as usize] {
            pool.for_loading(&memory, count).expect("memory");
        }
        let large = pool.large.as_ref().map_or(0, |staging| staging.region.len());
        // Of a small one, one chunk and its spare memory are used.
        let small = pool.small.as_ref().map_or(0, |_| 2 * ELEMENT_BYTES);
        let outside = match tracking {
            None => {
                let runs = IsolatedFrames::of_runs(&memory, page, cluster_pages).expect("memory");
                runs.0.expect("it is made").region.len()
            }
            // Calls and faults, each with the copies.
            Some(Tracking::Kernel) => {
                let mut isolated = IsolatedFrames::of_pages(&memory, page).expect("memory");
                let stack = isolated.made().expect("it is made");
                2 * (stack.page_count() * page.bytes() + stack.copies.len())
            }
            Some(_) => 0,
        };
        let read_by_faults = page.bytes_of(cluster_pages);
        let all = (large + small + outside) as u64 + read_by_faults;
        assert_eq!(most_bytes(page, chunk_pages, cluster_pages, tracking), all, "{tracking:?}");
    }
}
