//! The slot of each page that is present: from the page's number to its slot.
//!
//! A hash table with open addressing that stores only slots; the page numbers are in the slots.
//! Removing an entry leaves no mark: the entries after it move up.

use rustix::io::Errno;

use super::ghosts::{below, mix};
use crate::room::Zeros;

/// A hash table of slots, never more than two thirds full: each cell
/// that is looked at is a line of memory of the slots as well.
#[derive(Debug)]
pub struct Index {
    /// A slot and one, or 0: memory of zeros costs nothing until it is used.
    cells: Zeros<u32>,
}

impl Index {
    /// Room for `count` pages.
    pub fn new(count: usize) -> Result<Self, Errno> {
        Ok(Self { cells: Zeros::new(count + count / 2 + 1)? })
    }

    /// Bytes that it occupies.
    pub fn bytes(&self) -> usize {
        self.cells.len() * size_of::<u32>()
    }

    fn home(&self, number: u32) -> usize {
        below(mix(number.into()), self.cells.len())
    }

    fn after(&self, cell: usize) -> usize {
        if cell + 1 == self.cells.len() {
            0
        } else {
            cell + 1
        }
    }

    /// The first cell from the home of `number` that satisfies `test` or is empty.
    fn seek(&self, number: u32, test: impl Fn(usize) -> bool) -> usize {
        let mut cell = self.home(number);
        while self.cells[cell] != 0 && !test(self.cells[cell] as usize - 1) {
            cell = self.after(cell);
        }
        cell
    }

    /// The slot of `number`.
    pub fn find(&self, number: u32, slots: &[u32]) -> Option<usize> {
        let cell = self.seek(number, |slot| slots[slot] == number);
        (self.cells[cell] as usize).checked_sub(1)
    }

    /// Adds `number`, which is not in.
    pub fn insert(&mut self, number: u32, slot: usize) {
        let cell = self.seek(number, |_| false);
        self.cells[cell] = slot as u32 + 1;
    }

    /// `number` went from one slot to another.
    pub fn update(&mut self, number: u32, from: usize, to: usize) {
        let cell = self.seek(number, |slot| slot == from);
        debug_assert_ne!(self.cells[cell], 0, "a page that is in");
        self.cells[cell] = to as u32 + 1;
    }

    /// Removes `number`, which stands in `slot`.
    pub fn remove(&mut self, number: u32, slot: usize, slots: &[u32]) {
        let mut gap = self.seek(number, |other| other == slot);
        debug_assert_ne!(self.cells[gap], 0, "a page that is in");
        let mut cell = self.after(gap);
        while self.cells[cell] != 0 {
            let home = self.home(slots[self.cells[cell] as usize - 1]);
            // It may move up unless its home lies behind the gap.
            let distance = |from: usize| (cell + self.cells.len() - from) % self.cells.len();
            if distance(home) >= distance(gap) {
                self.cells[gap] = self.cells[cell];
                gap = cell;
            }
            cell = self.after(cell);
        }
        self.cells[gap] = 0;
    }
}
