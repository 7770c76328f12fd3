//! The kernel's page tables of a window, which count against its budget.
//!
//! One page-table page maps a *block* of 2 MiB (with system pages of 4 KiB). The kernel allocates
//! it when a page comes into the block. From Linux 6.14 on it can free it when the whole block is
//! dropped at once. Older kernels keep it as long as the window exists.

use std::ops::Range;

use super::frames::{Frames, Userfault};
use super::{SharedWindow, State};
use crate::error::Result;
use crate::room::zeros;
use crate::sys::mm::system_page_bytes;
use crate::sys::zeros::Zeros;
use crate::table::Table;
use crate::units::{PageSize, Prot, WindowPage};

/// What one page of page-table entries maps.
pub(super) fn block_bytes() -> u64 {
    let page = system_page_bytes() as u64;
    page * (page / size_of::<u64>() as u64)
}

/// The page tables of a window: one for each block in which a page is or was.
#[derive(Debug)]
pub(super) struct PageTables {
    /// Pages that are in each block.
    present: Zeros<u16>,
    /// A bit for each block that has a page table.
    tables: Zeros<u64>,
    count: u64,
    page: PageSize,
}

impl PageTables {
    pub(super) fn new(table: &Table, page: PageSize) -> Result<Self> {
        let blocks = page.bytes_of(table.page_count()).div_ceil(block_bytes()) as usize;
        let (present, tables) = (zeros("Window", blocks)?, zeros("Window", blocks.div_ceil(64))?);
        Ok(Self { present, tables, count: 0, page })
    }

    pub(super) fn page_size(&self) -> PageSize {
        self.page
    }

    pub(super) fn bytes(&self) -> u64 {
        self.count * system_page_bytes() as u64
    }

    /// Blocks that have no page table.
    pub(super) fn untouched(&self) -> u64 {
        self.present.len() as u64 - self.count
    }

    /// The blocks that a page lies in.
    fn blocks_of(&self, page: WindowPage) -> Range<usize> {
        let first = self.page.bytes_of(page.0) / block_bytes();
        let end = self.page.bytes_of(page.0 + 1).div_ceil(block_bytes());
        first as usize..end as usize
    }

    /// A page comes into the window, or leaves it.
    pub(super) fn note(&mut self, page: WindowPage, present: bool) {
        for block in self.blocks_of(page) {
            if present {
                self.present[block] += 1;
                let bit = 1 << (block % 64);
                self.count += u64::from(self.tables[block / 64] & bit == 0);
                self.tables[block / 64] |= bit;
            } else {
                self.present[block] -= 1;
            }
        }
    }

    /// The blocks of these pages that have a page table for nothing.
    fn empty_blocks(&self, pages: &[WindowPage]) -> Vec<usize> {
        let mut blocks: Vec<usize> = pages.iter().flat_map(|&page| self.blocks_of(page)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let for_nothing = |&block: &usize| {
            self.present[block] == 0 && self.tables[block / 64] & 1 << (block % 64) != 0
        };
        blocks.retain(for_nothing);
        blocks
    }

    /// The page table of a block was given back.
    fn forget(&mut self, block: usize) {
        self.tables[block / 64] &= !(1 << (block % 64));
        self.count -= 1;
    }
}

impl State {
    /// The window pages that lie in a block.
    fn pages_of_block(&self, block: usize) -> Range<u64> {
        let page = self.page_tables.page_size();
        let start = block as u64 * block_bytes();
        let end = page.count_of(start + block_bytes()).min(self.table.page_count());
        page.index_of(start)..end
    }

    /// Whether dropping a block changes nothing that anybody could see: the kernel keeps no
    /// note there that a page is forbidden, nor one that it should not have.
    fn may_drop_block(&self, block: usize) -> bool {
        self.pages_of_block(block).map(WindowPage).all(|page| {
            let entry = self.get(page);
            let noted = entry.prot() == Prot::None || entry.unreadable() || entry.stale();
            !noted && !entry.present()
        })
    }
}

impl<F: Frames> SharedWindow<F> {
    /// Gives back the page tables of blocks that `pages`, which have just left, were the
    /// last in.
    pub(super) fn give_back_page_tables(&self, state: &mut State, pages: &[WindowPage]) {
        if !self.frames.userfault().is_some_and(Userfault::reclaims_page_tables) {
            return;
        }
        let mut blocks = state.page_tables.empty_blocks(pages);
        blocks.retain(|&block| state.may_drop_block(block));
        let (len, window) = (block_bytes() as usize, self.frames.region().len());
        // A block that the window ends in is not the window's alone.
        blocks.retain(|&block| (block + 1) * len <= window);
        let ranges: Vec<_> = blocks.iter().map(|&block| (block * len, len)).collect();
        // Where the kernel refuses they are kept, and counted as before.
        if self.frames.drop_pages(&ranges).is_ok() {
            for block in blocks {
                state.page_tables.forget(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Origin;
    use crate::units::FilePage;

    fn tables(page_bytes: u64, page_count: u64) -> PageTables {
        let table = Table::new(page_count, Origin::Linear(FilePage(0)), Prot::Read).unwrap();
        PageTables::new(&table, PageSize::new(page_bytes, 4096).expect("a page")).unwrap()
    }

    #[test]
    fn a_block_has_a_table_from_its_first_page_on() {
        let mut tables = tables(4096, 4 * 512);
        assert_eq!((tables.bytes(), tables.untouched()), (0, 4));
        for page in [0, 511, 512] {
            tables.note(WindowPage(page), true);
        }
        assert_eq!((tables.bytes(), tables.untouched()), (2 * 4096, 2));
        tables.note(WindowPage(0), false);
        assert_eq!(tables.empty_blocks(&[WindowPage(0)]), [0; 0]);
        tables.note(WindowPage(511), false);
        tables.note(WindowPage(512), false);
        let left = [WindowPage(511), WindowPage(512), WindowPage(1500)];
        assert_eq!(tables.empty_blocks(&left), [0, 1]);
        tables.forget(0);
        assert_eq!(tables.bytes(), 4096);
        assert_eq!(tables.empty_blocks(&left), [1]);
    }

    #[test]
    fn a_large_page_lies_in_several_blocks() {
        let mut tables = tables(4 << 20, 3);
        tables.note(WindowPage(1), true);
        assert_eq!((tables.bytes(), tables.untouched()), (2 * 4096, 4));
        tables.note(WindowPage(1), false);
        assert_eq!(tables.empty_blocks(&[WindowPage(1)]), [2, 3]);
    }
}
