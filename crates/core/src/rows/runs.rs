//! Runs of consecutive rows, taken one run after another. A row of unequal length is such a run,
//! and its elements are rows here.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::units::{Pages, Row};

/// What a take is of.
#[derive(Debug)]
pub enum RowsOrRuns {
    /// Rows in any order.
    Rows(Pages<Row>),
    /// Rows that follow each other, several times.
    Runs(Runs),
}

impl RowsOrRuns {
    /// How many rows that are; none if that cannot be counted.
    pub(super) fn row_count(&self) -> Option<usize> {
        match self {
            Self::Rows(rows) => Some(rows.len()),
            Self::Runs(runs) => runs.row_count,
        }
    }

    /// Has an error name what the caller knows: the run that a row is in.
    pub(super) fn name(&self, error: Error) -> Error {
        match (self, error) {
            (Self::Runs(runs), Error::Row { operation, path, row, loss }) => {
                let row = runs.name_of(row).unwrap_or(row);
                Error::Row { operation, path, row, loss }
            }
            (_, error) => error,
        }
    }
}

/// Runs of rows, and what errors call each.
#[derive(Debug)]
pub struct Runs {
    names: Vec<i64>,
    ranges: Vec<Range<u64>>,
    row_count: Option<usize>,
}

impl Runs {
    /// Runs by their first row and their number of rows.
    ///
    /// # Errors
    /// [`Error::Argument`] for lists of unlike length, or a run that is not among `limit` rows.
    pub fn new(names: Vec<i64>, starts: &[i64], counts: &[i64], limit: u64) -> Result<Self> {
        let range = |(&start, &count): (&i64, &i64)| {
            let (start, count) = (u64::try_from(start).ok()?, u64::try_from(count).ok()?);
            start.checked_add(count).filter(|&end| end <= limit).map(|end| start..end)
        };
        let alike = names.len() == starts.len() && names.len() == counts.len();
        let ranges: Option<Vec<_>> = starts.iter().zip(counts).map(range).collect();
        let Some(ranges) = ranges.filter(|_| alike) else {
            let text = format!("take: runs that are not among the {limit} elements");
            return Err(Error::Argument(text));
        };
        let add = |sum: usize, range: &Range<u64>| {
            sum.checked_add(usize::try_from(range.end - range.start).ok()?)
        };
        let row_count = ranges.iter().try_fold(0, add);
        Ok(Self { names, ranges, row_count })
    }

    /// The rows of each.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().cloned()
    }

    /// What the first run is called that has a row.
    fn name_of(&self, row: u64) -> Option<u64> {
        let at = self.ranges.iter().position(|range| range.contains(&row))?;
        u64::try_from(self.names[at]).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_called_by_its_run() {
        let runs = Runs::new(vec![7, 3, 5], &[10, 0, 2], &[5, 0, 8], 15).expect("they fit");
        assert_eq!(runs.row_count, Some(13));
        assert_eq!([14, 9, 2].map(|row| runs.name_of(row)), [Some(7), Some(5), Some(5)]);
        assert_eq!([0, 15].map(|row| runs.name_of(row)), [None, None]);
    }

    #[test]
    fn runs_outside_are_refused() {
        for (starts, counts) in [(11, 5), (-1, 2), (3, -1), (i64::MAX, i64::MAX)] {
            assert!(Runs::new(vec![0], &[starts], &[counts], 15).is_err());
        }
        assert!(Runs::new(vec![0], &[0, 1], &[1, 1], 15).is_err());
        let most = Runs::new(vec![0; 3], &[0; 3], &[i64::MAX; 3], u64::MAX).expect("they fit");
        assert_eq!(most.row_count, None);
    }
}
