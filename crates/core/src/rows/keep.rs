//! Takes of rows of which some are kept in memory (`cache`).

use std::collections::HashMap;

use super::cache::{ByNumber, RowCache};
use super::{count, Rows};
use crate::error::Result;
use crate::io::{Pace, Segment};
use crate::room::{collected, room_for};
use crate::store::last_change::Unchanged;
use crate::sys::span::Span;
use crate::units::Row;

/// Since when each file of a take has not changed, as far as is known.
type Since = HashMap<u32, Option<Unchanged>, ByNumber>;

/// Memory for rows on their way.
fn room(bytes: usize) -> Result<Vec<u8>> {
    let mut made = room_for("take", bytes)?;
    made.resize(bytes, 0);
    Ok(made)
}

impl Rows {
    /// Copies the rows that are kept, takes the others, and keeps of them what the policy says.
    pub(super) fn take_kept(
        &self,
        cache: &RowCache,
        ids: &[Row],
        into: Span<'_>,
        wanted: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let row_bytes = self.row_bytes;
        let epoch = cache.epoch();
        let mut since = Since::with_hasher(ByNumber::default());
        let mut kept = room(row_bytes)?;
        let mut missing = room_for("take", ids.len())?;
        for (place, &row) in ids.iter().enumerate() {
            let file = self.file_of(row);
            let known = *since.entry(file).or_insert_with(|| self.files.before_copies(file));
            // Through memory of our own: nobody's fault may happen under the cache's lock.
            if known.is_some_and(|known| cache.get(row.0, known.ns(), &mut kept)) {
                into.part(place * row_bytes, row_bytes).copy_from(&kept);
            } else {
                missing.push(place);
            }
        }
        count(&self.counters.cache_hits, (ids.len() - missing.len()) as u64);
        let memory = self.take_to(ids, &missing, into, wanted, pace)?;
        let changed = |(&file, &known): (&u32, &Option<Unchanged>)| {
            let changed = known.filter(|&known| !self.files.after_copies(file, known));
            changed.map(|_| file)
        };
        let changed: Vec<u32> = since.iter().filter_map(changed).collect();
        for (bytes, &place) in memory.chunks_exact(row_bytes).zip(&missing) {
            let file = self.file_of(ids[place]);
            if let Some(known) = since[&file].filter(|_| !changed.contains(&file)) {
                cache.put(ids[place].0, known.ns(), bytes, epoch);
            }
        }
        if !changed.is_empty() {
            // Taken again, which says what is wrong, if something is.
            let is_of = |&place: &usize| changed.contains(&self.file_of(ids[place]));
            let again: Vec<usize> = collected("take", (0..ids.len()).filter(is_of))?;
            self.take_to(ids, &again, into, wanted, pace)?;
        }
        Ok(())
    }

    fn file_of(&self, row: Row) -> u32 {
        self.files.shard(self.files.shard_of(row.0)).file_number()
    }

    /// Takes the rows at some places to these, and returns them one after another.
    fn take_to(
        &self,
        ids: &[Row],
        places: &[usize],
        into: Span<'_>,
        wanted: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<Vec<u8>> {
        let rows: Vec<Row> = collected("take", places.iter().map(|&place| ids[place]))?;
        let mut memory = room(rows.len() * self.row_bytes)?;
        if !rows.is_empty() {
            self.take_piece_of_list(&rows, Span::of(&mut memory), wanted, pace)?;
        }
        for (bytes, &place) in memory.chunks_exact(self.row_bytes).zip(places) {
            into.part(place * self.row_bytes, self.row_bytes).copy_from(bytes);
        }
        Ok(memory)
    }
}
