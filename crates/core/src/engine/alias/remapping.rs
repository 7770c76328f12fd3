//! The steps of a remap of engine `alias`, and how to roll them back.

use super::mapped::{access, one_file_each};
use super::Alias;
use crate::engine::{room_for, RemapOptions};
use crate::error::{Error, Interrupt, Result};
use crate::plan::{self, Changes, LinearRun};
use crate::room::copied;
use crate::sys::lock::lock;
use crate::sys::mm::Access;
use crate::sys::stderr_line::stderr_line;
use crate::table::{Entry, Shown, Table};
use crate::units::{PageIndex, Run, WindowPage};

/// Pages of a remap that are looked at between two questions whether to stop.
const PLANNED_PAGES: usize = 1 << 16;

/// What a remap has to do.
pub(super) struct Remapping {
    /// The words to be, by position.
    pub(super) entries: Vec<Entry>,
    /// What differs from what is shown.
    pub(super) runs: Vec<LinearRun>,
    /// What was there, by position.
    pub(super) replaced: Vec<Replaced>,
}

/// A page as it was before a remap.
pub(super) struct Replaced {
    page: WindowPage,
    entry: Entry,
    /// What a placed page held.
    content: Option<Vec<u8>>,
}

impl Alias {
    /// Finds out what a remap has to do and what it replaces, before it changes anything.
    pub(super) fn plan(
        &self,
        changes: &Changes,
        options: RemapOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Remapping> {
        let mut entries = room_for("remap", changes.len())?;
        let mut replaced = room_for("remap", changes.len())?;
        let mut runs = Vec::new();
        for piece in plan::pieces(changes.len(), PLANNED_PAGES) {
            // Not with the table locked: a signal handler may ask for it. No other call changes
            // it in between.
            interrupt.check()?;
            let table = lock(&self.table);
            plan::add_linear_runs(&mut runs, &table, changes, piece.clone(), options.prot)?;
            for position in piece {
                let (page, file) = changes.pair(position);
                let old = table.get(page);
                entries.push(Entry::new(Shown::File(file), options.prot.unwrap_or(old.prot())));
                let content = match old.shown() {
                    Shown::Placed => Some(self.placed_content(page, old)?),
                    Shown::File(_) | Shown::Nothing => None,
                };
                replaced.push(Replaced { page, entry: old, content });
            }
        }
        Ok(Remapping { entries, runs: one_file_each(&self.store, "remap", runs)?, replaced })
    }

    fn placed_content(&self, page: WindowPage, entry: Entry) -> Result<Vec<u8>> {
        let fail = |errno| Error::system("remap", errno);
        let (offset, len) = self.bytes(Run { first: page, count: 1 });
        if access(entry) != Access::None {
            return copied("remap", self.region.span(offset, len));
        }
        self.region.protect(offset, len, Access::Read).map_err(fail)?;
        let content = copied("remap", self.region.span(offset, len));
        let take_access = || self.region.protect(offset, len, Access::None);
        // It can lack memory for a moment, and there is nothing to undo it with.
        take_access().or_else(|_| take_access()).map_err(fail)?;
        content
    }

    /// Shows what was replaced again, with a mapping for each run that it had.
    pub(super) fn roll_back(&self, table: &mut Table, replaced: &mut [Replaced]) {
        let (mut failed, mut unlocked) = (0, 0);
        replaced.sort_unstable_by_key(|old| old.page);
        let mut rest = &*replaced;
        while let [old, others @ ..] = rest {
            if table.get(old.page) == old.entry {
                rest = others;
                continue;
            }
            let run = Run { first: old.page, count: self.alike(table, rest) };
            let result = if let Some(content) = &old.content {
                table.update(old.page, |new| new.with_prot(old.entry.prot()));
                self.put(table, old.page, content)
            } else {
                let entry_of = |index, _| rest[index as usize].entry;
                Self::change(table, run, entry_of, |entry| self.map(entry, run))
            };
            failed += if result.is_err() { run.count } else { 0 };
            let locked = result.is_ok() && self.lock_again(run).is_ok();
            unlocked += if result.is_ok() && !locked { run.count } else { 0 };
            rest = &rest[run.count as usize..];
        }
        if unlocked > 0 {
            stderr_line(format_args!("remap: {unlocked} window pages could not be locked again"));
        }
        if failed > 0 {
            // The table and the kernel agree on the new pages then.
            stderr_line(format_args!(
                "remap: {failed} window pages could not be rolled back; `mapping` says which"
            ));
        }
    }

    /// How many of the first of `replaced` (sorted) one mapping showed and can show again.
    fn alike(&self, table: &Table, replaced: &[Replaced]) -> u64 {
        let most = match replaced[0].entry.shown() {
            Shown::File(first) => {
                let run = Run { first, count: replaced.len() as u64 };
                self.store.cut(run).next().map_or(1, |piece| piece.count)
            }
            Shown::Nothing => replaced.len() as u64,
            Shown::Placed => 1,
        };
        let follows = |pair: &&[Replaced]| {
            let changed = table.get(pair[1].page) != pair[1].entry;
            changed
                && pair[1].page == pair[0].page.offset(1)
                && plan::continues(pair[0].entry, pair[1].entry)
        };
        let alike = replaced.windows(2).take_while(follows).count() as u64 + 1;
        alike.min(most)
    }
}
