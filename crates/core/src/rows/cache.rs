//! Rows that are kept in memory, for tables much larger than the memory of a cgroup: the page cache
//! would keep a whole page for the sake of one row.
//!
//! The policy is a clock (a row that was used since the clock's hand last passed stays) with a
//! doorkeeper: once the cache is full, a row is admitted when it is wanted for the second time. On
//! Zipf distributions it hits as often as S3-FIFO, and more often than SIEVE and LRU
//! ([018](../../../../docs/decisions/018-rows-kept-in-memory.md)), and it needs no lists.
//!
//! A row is kept with the time of its file's last change (`last_change`), and is valid while the
//! file has that time.

use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use crate::sys::fork_lock::ForkLock;
use crate::sys::mm::{Access, Region};
use crate::sys::zeros::Zeros;

/// Parts, each with a lock.
const PARTS: usize = 32;
/// Rows from which on there are so many parts.
const MANY_ROWS: usize = PARTS * 64;
/// Bytes that a row takes besides its own: up to four places of the index, its number, its time,
/// its mark, and a place at the door.
pub(super) const ROW_OVERHEAD: usize = 4 * 4 + 8 + 8 + 1 + 4;

/// Rows in memory.
#[derive(Debug)]
pub(super) struct RowCache {
    parts: Vec<ForkLock<Part>>,
    rows: AtomicU64,
    /// How often all was forgotten.
    epoch: AtomicU64,
    row_bytes: usize,
}

/// Some of the rows.
#[derive(Debug, Default)]
struct Part {
    /// Places that are one more than the slot of a row; 0 where there is none. Twice as many as
    /// slots, or more: a power of two.
    index: Zeros<u32>,
    /// Of each slot: its row, the time of its file, and whether it was used since the hand came by.
    rows: Zeros<u64>,
    stamps: Zeros<i64>,
    used: Zeros<u8>,
    /// Rows that were wanted once, by a part of their hash.
    door: Zeros<u32>,
    bytes: Option<Region>,
    hand: usize,
    /// Slots that have a row, the first ones.
    filled: usize,
}

fn hash(row: u64) -> u64 {
    let mixed = (row ^ (row >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

impl RowCache {
    /// A cache of rows that take `cache_bytes` together; none if that is not one row.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn new(cache_bytes: u64, row_bytes: usize) -> Result<Option<Self>, Errno> {
        let rows = cache_bytes / (row_bytes + ROW_OVERHEAD) as u64;
        let rows = usize::try_from(rows.min(u64::from(u32::MAX))).unwrap_or(usize::MAX);
        if rows == 0 || row_bytes == 0 {
            return Ok(None);
        }
        let count = if rows < MANY_ROWS { 1 } else { PARTS };
        let part = |_| Part::new(rows / count, row_bytes).map(ForkLock::new);
        let parts = (0..count).map(part).collect::<Result<_, _>>()?;
        Ok(Some(Self { parts, rows: AtomicU64::new(0), epoch: AtomicU64::new(0), row_bytes }))
    }

    /// Bytes of the rows that it has, with what each takes besides.
    pub(super) fn held_bytes(&self) -> u64 {
        self.rows.load(Ordering::Relaxed) * (self.row_bytes + ROW_OVERHEAD) as u64
    }

    fn part(&self, hash: u64) -> &ForkLock<Part> {
        &self.parts[(hash >> 32) as usize % self.parts.len()]
    }

    /// Copies a row whose file has this time; whether it is there.
    pub(super) fn get(&self, row: u64, stamp: i64, into: &mut [u8]) -> bool {
        let hash = hash(row);
        self.part(hash).lock().get(row, hash, stamp, into)
    }

    /// What a take has to know before it reads rows that it may keep.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Keeps a row that was read in this epoch, if the policy would.
    pub(super) fn put(&self, row: u64, stamp: i64, bytes: &[u8], epoch: u64) {
        let hash = hash(row);
        let mut part = self.part(hash).lock();
        if self.epoch() == epoch && part.put(row, hash, stamp, bytes) {
            self.rows.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Forgets all rows, and those that takes read meanwhile.
    pub(super) fn clear(&self) {
        self.empty(Part::clear);
    }

    /// The same, and keeps none any more.
    pub(super) fn close(&self) {
        self.empty(|part| *part = Part::default());
    }

    fn empty(&self, how: impl Fn(&mut Part)) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for part in &self.parts {
            let mut part = part.lock();
            self.rows.fetch_sub(part.filled as u64, Ordering::Relaxed);
            how(&mut part);
        }
    }
}

impl Part {
    fn new(slots: usize, row_bytes: usize) -> Result<Self, Errno> {
        Ok(Self {
            index: Zeros::new((2 * slots).next_power_of_two())?,
            rows: Zeros::new(slots)?,
            stamps: Zeros::new(slots)?,
            used: Zeros::new(slots)?,
            door: Zeros::new(slots)?,
            bytes: Some(Region::anonymous(slots * row_bytes, 1, Access::Write)?),
            hand: 0,
            filled: 0,
        })
    }

    fn clear(&mut self) {
        self.index.fill(0);
        (self.filled, self.hand) = (0, 0);
    }

    fn slot_at(&self, place: usize) -> Option<usize> {
        (self.index[place] as usize).checked_sub(1)
    }

    /// The place of the index where a row is, or where it would be.
    fn place_of(&self, row: u64, hash: u64) -> usize {
        let mask = self.index.len() - 1;
        let mut place = hash as usize & mask;
        while self.slot_at(place).is_some_and(|slot| self.rows[slot] != row) {
            place = (place + 1) & mask;
        }
        place
    }

    fn get(&mut self, row: u64, hash: u64, stamp: i64, into: &mut [u8]) -> bool {
        let Some(bytes) = &self.bytes else { return false };
        let slot = self.slot_at(self.place_of(row, hash));
        let Some(slot) = slot.filter(|&slot| self.stamps[slot] == stamp) else { return false };
        self.used[slot] = 1;
        bytes.span(slot * into.len(), into.len()).copy_to(into);
        true
    }

    /// Whether there is one row more than before.
    fn put(&mut self, row: u64, hash: u64, stamp: i64, row_bytes: &[u8]) -> bool {
        if self.bytes.is_none() {
            return false;
        }
        let place = self.place_of(row, hash);
        let before = self.filled;
        let slot = if let Some(slot) = self.slot_at(place) {
            slot
        } else {
            let Some(slot) = self.admitted(hash) else { return false };
            // What left may have been in the way.
            let place = self.place_of(row, hash);
            self.index[place] = slot as u32 + 1;
            self.rows[slot] = row;
            self.used[slot] = 0;
            slot
        };
        self.stamps[slot] = stamp;
        if let Some(bytes) = &self.bytes {
            bytes.span(slot * row_bytes.len(), row_bytes.len()).copy_from(row_bytes);
        }
        self.filled > before
    }

    /// A slot for a row, if it is let in.
    fn admitted(&mut self, hash: u64) -> Option<usize> {
        let slots = self.rows.len();
        if self.filled < slots {
            self.filled += 1;
            return Some(self.filled - 1);
        }
        let tag = (hash >> 32) as u32 | 1;
        let door = &mut self.door[(hash >> 3) as usize % slots];
        if *door != tag {
            *door = tag;
            return None;
        }
        while std::mem::take(&mut self.used[self.hand]) != 0 {
            self.hand = (self.hand + 1) % slots;
        }
        let slot = self.hand;
        self.hand = (self.hand + 1) % slots;
        self.forget(slot);
        Some(slot)
    }

    /// Takes a slot's row out of the index, and moves those behind it up that would not be found.
    fn forget(&mut self, slot: usize) {
        let mask = self.index.len() - 1;
        let row = self.rows[slot];
        let mut hole = self.place_of(row, hash(row));
        let mut place = hole;
        loop {
            self.index[hole] = 0;
            let next = loop {
                place = (place + 1) & mask;
                let Some(slot) = self.slot_at(place) else { return };
                let first = hash(self.rows[slot]) as usize & mask;
                if (place.wrapping_sub(first) & mask) >= (place.wrapping_sub(hole) & mask) {
                    break slot;
                }
            };
            self.index[hole] = next as u32 + 1;
            hole = place;
        }
    }
}

/// Hashes numbers of files.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct ByNumber(u64);

impl BuildHasher for ByNumber {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        Self(0)
    }
}

impl Hasher for ByNumber {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only numbers are hashed")
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = hash(number.into());
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};

    use super::*;

    fn row_of(cache: &RowCache, row: u64, stamp: i64) -> Option<u64> {
        let mut bytes = [0; 8];
        cache.get(row, stamp, &mut bytes).then(|| u64::from_ne_bytes(bytes))
    }

    fn cache_of(rows: u64) -> RowCache {
        let bytes = rows * (8 + ROW_OVERHEAD as u64);
        RowCache::new(bytes, 8).expect("there is memory").expect("more than one row")
    }

    /// Pseudo-random numbers below 1.
    struct Draw(u64);

    impl Draw {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(1);
            f64::from((hash(hash(self.0)) >> 32) as u32) / 4_294_967_296.0
        }
    }

    /// Rows that are wanted as often as Zipf says, in any order.
    fn zipf(rows: u32, exponent: f64, count: usize, draw: &mut Draw) -> Vec<u64> {
        let mut sums: Vec<f64> = Vec::new();
        for rank in 1..=rows {
            let before = sums.last().copied().unwrap_or(0.0);
            sums.push(before + f64::from(rank).powf(-exponent));
        }
        let all = sums.last().copied().unwrap_or(1.0);
        let rank = |at: f64| sums.partition_point(|&sum| sum < at * all) as u64;
        (0..count).map(|_| rank(draw.next()) * 7919 % u64::from(rows)).collect()
    }

    fn hits_here(trace: &[u64], rows: u64) -> usize {
        let cache = cache_of(rows);
        let mut hits = 0;
        for &row in trace {
            match row_of(&cache, row, 1) {
                Some(found) => {
                    assert_eq!(found, row);
                    hits += 1;
                }
                None => cache.put(row, 1, &row.to_ne_bytes(), cache.epoch()),
            }
        }
        hits
    }

    /// LRU, by a queue in which all but the last time of a row is passed over.
    fn hits_of_lru(trace: &[u64], rows: u64) -> usize {
        let (mut last, mut queue, mut hits) = (HashMap::new(), VecDeque::new(), 0);
        for (time, &row) in trace.iter().enumerate() {
            hits += usize::from(last.insert(row, time).is_some());
            queue.push_back((row, time));
            while last.len() as u64 > rows {
                let (row, time) = queue.pop_front().expect("all rows are in it");
                if last.get(&row) == Some(&time) {
                    last.remove(&row);
                }
            }
        }
        hits
    }

    /// A row of 20 000, the first ones more often.
    #[allow(clippy::cast_sign_loss)] // it is positive
    fn often_low(draw: &mut Draw) -> u64 {
        (draw.next() * draw.next() * 20_000.0) as u64
    }

    #[test]
    fn it_keeps_more_than_lru() {
        let mut draw = Draw(1);
        for exponent in [0.8, 1.0, 1.2] {
            let mut trace = zipf(20_000, exponent, 200_000, &mut draw);
            for scan in [false, true] {
                if scan {
                    // All rows once, twice on the way.
                    for begin in [50_000, 150_000] {
                        trace.splice(begin..begin, 0..20_000);
                    }
                }
                for rows in [200, 2_000] {
                    let (here, lru) = (hits_here(&trace, rows), hits_of_lru(&trace, rows));
                    assert!(here > lru, "{exponent} {scan} {rows}: {here} hits, LRU {lru}");
                }
            }
        }
    }

    #[test]
    fn what_it_has_is_right_and_within_its_bytes() {
        let mut draw = Draw(5);
        for rows in [1, 2, 63, 5000] {
            let cache = cache_of(rows);
            let mut stamps: HashMap<u64, i64> = HashMap::new();
            for turn in 0..60_000 {
                let row = often_low(&mut draw);
                let stamp = *stamps.entry(row).or_insert(0);
                if let Some(found) = row_of(&cache, row, stamp) {
                    assert_eq!(found, row * 1000 + stamp.cast_unsigned());
                }
                assert_eq!(row_of(&cache, row, stamp + 1), None);
                if turn % 7 == 0 {
                    stamps.insert(row, stamp + 1);
                }
                let stamp = stamps[&row];
                cache.put(
                    row,
                    stamp,
                    &(row * 1000 + stamp.cast_unsigned()).to_ne_bytes(),
                    cache.epoch(),
                );
                assert!(cache.held_bytes() <= rows * (8 + ROW_OVERHEAD as u64));
            }
            assert!(cache.held_bytes() > 0);
        }
    }

    #[test]
    fn nothing_is_kept_where_no_row_fits() {
        assert!(RowCache::new(0, 160).expect("nothing is allocated").is_none());
        assert!(RowCache::new(160, 160).expect("nothing is allocated").is_none());
        assert!(RowCache::new(1000, 0).expect("nothing is allocated").is_none());
    }
}
