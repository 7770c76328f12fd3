//! Plans: from a table and a request, the smallest list of operations.
//!
//! Pure: no system call, no state. The engines execute the plans.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::room::{collected, push};
use crate::table::{Entry, Shown, Table};
use crate::units::{FilePage, PageIndex, Pages, Prot, Run, WindowPage};

/// Which window pages are to show which file pages: two selections of one length.
#[derive(Clone, Debug)]
pub struct Changes {
    at: Pages<WindowPage>,
    file_pages: Pages<FilePage>,
}

impl Changes {
    /// Pairs the selections up.
    /// Fails if their lengths differ or a window page is named twice.
    pub fn new(at: Pages<WindowPage>, file_pages: Pages<FilePage>) -> Result<Self> {
        if at.len() != file_pages.len() {
            return Err(Error::Argument(format!(
                "remap: {} file pages for {} window pages; give one window page for each, or the \
                 first one as a single number",
                file_pages.len(),
                at.len()
            )));
        }
        check_named_once("remap", &at)?;
        Ok(Self { at, file_pages })
    }

    /// The number of pairs.
    pub fn len(&self) -> usize {
        self.at.len()
    }

    /// The window pages, in the caller's order.
    pub fn window_pages(&self) -> &Pages<WindowPage> {
        &self.at
    }

    /// The pair at `position`.
    pub fn pair(&self, position: usize) -> (WindowPage, FilePage) {
        (self.at.at(position), self.file_pages.at(position))
    }
}

/// Fails if a window page is named twice.
pub fn check_named_once(operation: &'static str, pages: &Pages<WindowPage>) -> Result<()> {
    let Pages::List(list) = pages else { return Ok(()) };
    if list.windows(2).all(|pair| pair[0] < pair[1]) {
        return Ok(());
    }
    let mut sorted = collected(operation, list.iter().copied())?;
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::Argument(format!(
            "{operation}: window page {} is named twice; a window page shows one content",
            pair[0].0
        ))),
        None => Ok(()),
    }
}

/// Fails if a page was placed, so that its content would be lost.
pub fn check_placed(
    table: &Table,
    operation: &'static str,
    pages: &Pages<WindowPage>,
    discard: bool,
) -> Result<()> {
    if discard || table.counts().placed == 0 {
        return Ok(());
    }
    match pages.iter().find(|page| table.get(*page).shown() == Shown::Placed) {
        Some(page) => Err(Error::Placed { operation, window_page: page.0 }),
        None => Ok(()),
    }
}

/// Fails if a page has no content that `place` could keep.
pub fn check_shown(table: &Table, pages: &Pages<WindowPage>) -> Result<()> {
    match pages.iter().find(|page| table.get(*page).shown() == Shown::Nothing) {
        Some(page) => Err(Error::Argument(format!(
            "place: window page {} shows nothing, so there is no content to keep; pass data",
            page.0
        ))),
        None => Ok(()),
    }
}

/// The same pages, each once, sorted where they were a list: for operations
/// that come to the same in any order.
pub fn distinct<P: PageIndex>(operation: &'static str, pages: &Pages<P>) -> Result<Pages<P>> {
    Ok(match pages {
        Pages::Range(range) => Pages::Range(range.clone()),
        Pages::List(list) => {
            let mut sorted = collected(operation, list.iter().copied())?;
            sorted.sort_unstable();
            sorted.dedup();
            Pages::List(sorted)
        }
    })
}

/// The pages of a selection, to be asked often: sorted where they are a list.
#[derive(Clone, Debug)]
pub struct Members(Pages<WindowPage>);

/// The members of a selection.
pub fn members(operation: &'static str, pages: &Pages<WindowPage>) -> Result<Members> {
    distinct(operation, pages).map(Members)
}

impl Members {
    /// Whether a page is among them.
    pub fn contains(&self, page: WindowPage) -> bool {
        match &self.0 {
            Pages::Range(range) => range.contains(&page.0),
            Pages::List(list) => list.binary_search(&page).is_ok(),
        }
    }
}

/// The positions of a selection of `len` pages, `most` at a time.
pub fn pieces(len: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(most).map(move |start| start..len.min(start + most))
}

/// Maximal runs of consecutive pages, in the order given.
pub fn runs<P: PageIndex>(pages: impl IntoIterator<Item = P>) -> impl Iterator<Item = Run<P>> {
    let mut pages = pages.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut run = Run { first: pages.next()?, count: 1 };
        while pages.next_if(|page| *page == run.end()).is_some() {
            run.count += 1;
        }
        Some(run)
    })
}

/// Joins sorted runs whose gap is at most `max_gap` pages, all of them satisfying
/// `may_cross`: one call over a gap can be cheaper than two calls.
pub fn join_runs(
    runs: Vec<Run<WindowPage>>,
    max_gap: u64,
    may_cross: impl Fn(WindowPage) -> bool,
) -> Vec<Run<WindowPage>> {
    let mut joined: Vec<Run<WindowPage>> = Vec::with_capacity(runs.len());
    for run in runs {
        if let Some(last) = joined.last_mut() {
            let end = last.end().0;
            let near = run.first.0 >= end && run.first.0 - end <= max_gap;
            if near && (end..run.first.0).all(|page| may_cross(WindowPage(page))) {
                last.count = run.end().0 - last.first.0;
                continue;
            }
        }
        joined.push(run);
    }
    joined
}

/// A run of window pages that shows a run of file pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearRun {
    /// The window pages.
    pub window: Run<WindowPage>,
    /// The file page that the first of them shows.
    pub file: FilePage,
}

impl LinearRun {
    /// Whether a page that shows a file page continues it.
    fn ends_before(self, page: WindowPage, file: FilePage) -> bool {
        self.window.end() == page && self.file.offset(self.window.count) == file
    }
}

/// Adds the runs of a piece of `changes` that differ from what the table shows,
/// neighbours joined, in the caller's order. `prot` is the new protection, if any.
pub fn add_linear_runs(
    runs: &mut Vec<LinearRun>,
    table: &Table,
    changes: &Changes,
    piece: Range<usize>,
    prot: Option<Prot>,
) -> Result<()> {
    for position in piece {
        let (window, file) = changes.pair(position);
        let entry = table.get(window);
        if entry.shown() == Shown::File(file) && prot.is_none_or(|prot| prot == entry.prot()) {
            continue;
        }
        let same_prot =
            |other: WindowPage| prot.is_some() || table.get(other).prot() == entry.prot();
        match runs.last_mut() {
            Some(run) if run.ends_before(window, file) && same_prot(run.window.first) => {
                run.window.count += 1;
            }
            _ => push("remap", runs, LinearRun { window: Run { first: window, count: 1 }, file })?,
        }
    }
    Ok(())
}

/// Whether the kernel keeps two neighbouring pages of an aliased window in one mapping.
pub fn continues(left: Entry, right: Entry) -> bool {
    match (left.shown(), right.shown()) {
        (Shown::File(a), Shown::File(b)) => a.offset(1) == b && left.prot() == right.prot(),
        (Shown::Nothing, Shown::Nothing) => true,
        _ => false,
    }
}

/// All pages of a table that show file pages, neighbours joined, in the window's order.
pub fn linear_runs(table: &Table) -> Result<Vec<LinearRun>> {
    let mut runs: Vec<LinearRun> = Vec::new();
    let mut page = WindowPage(0);
    while page.0 < table.page_count() {
        let count = table.original_pages(page).max(1);
        if let Shown::File(file) = table.get(page).shown() {
            match runs.last_mut() {
                Some(run) if run.ends_before(page, file) => run.window.count += count,
                _ => {
                    let window = Run { first: page, count };
                    push("Window", &mut runs, LinearRun { window, file })?;
                }
            }
        }
        page = page.offset(count);
    }
    Ok(runs)
}

/// Mapping boundaries of the table from the one before `run` to the one after it.
#[cfg(test)]
fn boundaries(table: &Table, run: Run<WindowPage>) -> u64 {
    let first = run.first.0.max(1);
    let last = run.end().0.min(table.page_count() - 1);
    (first..=last)
        .filter(|&page| !continues(table.get(WindowPage(page - 1)), table.get(WindowPage(page))))
        .count() as u64
}

/// No more than how many mappings the process has at any time while `runs` are
/// changed one after another: each end of a run that is no boundary yet may become one.
pub fn mappings_added(table: &Table, runs: impl IntoIterator<Item = Run<WindowPage>>) -> u64 {
    let boundary = |page: WindowPage| {
        page.0 == 0
            || page.0 >= table.page_count()
            || !continues(table.get(WindowPage(page.0 - 1)), table.get(page))
    };
    let mut added = 0;
    let mut counted_end = None;
    for run in runs {
        added += u64::from(counted_end != Some(run.first) && !boundary(run.first));
        added += u64::from(!boundary(run.end()));
        counted_end = Some(run.end());
    }
    added
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Origin;

    fn linear(page_count: u64) -> Table {
        Table::new(page_count, Origin::Linear(FilePage(0)), Prot::Read).unwrap()
    }

    fn list<P: PageIndex>(pages: &[u64]) -> Pages<P> {
        Pages::List(pages.iter().map(|&page| P::new(page)).collect())
    }

    fn changes(at: &[u64], file_pages: &[u64]) -> Changes {
        Changes::new(list(at), list(file_pages)).unwrap()
    }

    fn plain(runs: &[LinearRun]) -> Vec<(u64, u64, u64)> {
        runs.iter().map(|e| (e.window.first.0, e.file.0, e.window.count)).collect()
    }

    fn all_runs(pages: impl IntoIterator<Item = WindowPage>) -> Vec<Run<WindowPage>> {
        runs(pages).collect()
    }

    fn differing(table: &Table, changes: &Changes, prot: Option<Prot>) -> Vec<LinearRun> {
        let mut runs = Vec::new();
        // In two pieces, as of a long call.
        let middle = changes.len() / 2;
        for piece in [0..middle, middle..changes.len()] {
            add_linear_runs(&mut runs, table, changes, piece, prot).unwrap();
        }
        runs
    }

    fn run(first: u64, count: u64) -> Run<WindowPage> {
        Run { first: WindowPage(first), count }
    }

    #[test]
    fn a_window_page_named_twice_is_refused_and_named() {
        let error = Changes::new(list(&[5, 2, 5]), list(&[0, 1, 2])).unwrap_err();
        assert!(error.to_string().contains("window page 5 is named twice"), "{error}");
    }

    #[test]
    fn distinct_pages_are_sorted_and_named_once() {
        assert_eq!(distinct("pin", &list::<WindowPage>(&[5, 1, 5, 3])).unwrap(), list(&[1, 3, 5]));
        let range = Pages::<WindowPage>::Range(2..4);
        assert_eq!(distinct("pin", &range).unwrap(), range);
    }

    #[test]
    fn selections_of_different_lengths_are_refused() {
        assert!(Changes::new(Pages::Range(0..3), list(&[1, 2])).is_err());
    }

    #[test]
    fn neighbours_on_both_sides_become_one_extent() {
        let plan = differing(&linear(100), &changes(&[10, 11, 12, 20], &[50, 51, 52, 53]), None);
        assert_eq!(plain(&plan), [(10, 50, 3), (20, 53, 1)]);
    }

    #[test]
    fn neighbours_in_the_window_alone_do_not_join() {
        let plan = differing(&linear(100), &changes(&[0, 1, 2], &[9, 8, 7]), None);
        assert_eq!(plain(&plan), [(0, 9, 1), (1, 8, 1), (2, 7, 1)]);
    }

    #[test]
    fn pages_that_already_show_it_are_left_alone() {
        let plan = differing(&linear(10), &changes(&[0, 1, 2, 3], &[0, 1, 7, 3]), None);
        assert_eq!(plain(&plan), [(2, 7, 1)]);
    }

    #[test]
    fn new_protection_alone_is_a_change() {
        let same = changes(&[0, 1], &[0, 1]);
        assert_eq!(plain(&differing(&linear(10), &same, Some(Prot::None))), [(0, 0, 2)]);
        assert_eq!(plain(&differing(&linear(10), &same, Some(Prot::Read))), []);
    }

    #[test]
    fn pages_of_different_protection_do_not_join() {
        let mut table = linear(10);
        table.update(WindowPage(1), |entry| entry.with_prot(Prot::None));
        let plan = differing(&table, &changes(&[0, 1], &[5, 6]), None);
        assert_eq!(plain(&plan), [(0, 5, 1), (1, 6, 1)]);
    }

    #[test]
    fn runs_are_joined_over_small_gaps_that_may_be_crossed() {
        let apart = all_runs([0, 1, 4, 5, 20].map(WindowPage));
        assert_eq!(apart, [run(0, 2), run(4, 2), run(20, 1)]);
        assert_eq!(join_runs(apart.clone(), 2, |_| true), [run(0, 6), run(20, 1)]);
        assert_eq!(join_runs(apart.clone(), 2, |page| page.0 != 3), apart);
        assert_eq!(
            join_runs(all_runs([9, 3].map(WindowPage)), 9, |_| true),
            [run(9, 1), run(3, 1)]
        );
    }

    #[test]
    fn a_piece_in_the_middle_adds_two_mappings_and_at_an_end_one() {
        let table = linear(100);
        assert_eq!(mappings_added(&table, [run(50, 1)]), 2);
        assert_eq!(mappings_added(&table, [run(0, 10)]), 1);
        assert_eq!(mappings_added(&table, [run(0, 100)]), 0);
        assert_eq!(mappings_added(&table, [run(50, 1), run(51, 1), run(52, 1)]), 4);
    }

    #[test]
    fn linear_runs_are_as_long_as_they_can_be() {
        let mut table = linear(2000);
        assert_eq!(plain(&linear_runs(&table).unwrap()), [(0, 0, 2000)]);
        table.set(WindowPage(700), Entry::new(Shown::Nothing, Prot::Read));
        table.set(WindowPage(701), Entry::new(Shown::File(FilePage(5)), Prot::Read));
        let runs = plain(&linear_runs(&table).unwrap());
        assert_eq!(runs, [(0, 0, 700), (701, 5, 1), (702, 702, 1298)]);
        let nothing = Table::new(1000, Origin::Nothing, Prot::Read).unwrap();
        assert_eq!(linear_runs(&nothing).unwrap(), []);
    }

    #[test]
    fn boundaries_count_where_mappings_end() {
        let mut table = linear(100);
        assert_eq!(boundaries(&table, run(0, 100)), 0);
        table.set(WindowPage(50), Entry::new(Shown::File(FilePage(7)), Prot::Read));
        assert_eq!(boundaries(&table, run(50, 1)), 2);
        assert_eq!(boundaries(&table, run(0, 100)), 2);
        table.set(WindowPage(50), Entry::new(Shown::File(FilePage(50)), Prot::None));
        assert_eq!(boundaries(&table, run(50, 1)), 2);
        table.set(WindowPage(50), Entry::new(Shown::File(FilePage(50)), Prot::Read));
        assert_eq!(boundaries(&table, run(50, 1)), 0);
    }

    #[test]
    fn the_bound_holds_for_every_step_of_any_sequence_of_changes() {
        // A small linear congruential generator: reproducible without a crate.
        let mut state = 12345_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..200 {
            let mut table = linear(24);
            for _ in 0..3 {
                let at: Vec<u64> = {
                    let mut pages: Vec<u64> = (0..24).filter(|_| random(3) == 0).collect();
                    let turn = random(24) as usize % pages.len().max(1);
                    pages.rotate_left(turn);
                    pages
                };
                let files: Vec<u64> = at.iter().map(|_| random(12)).collect();
                let changes = changes(&at, &files);
                let plan = differing(&table, &changes, None);
                let whole = run(0, 24);
                let bound = boundaries(&table, whole)
                    + mappings_added(&table, plan.iter().map(|run| run.window));
                for run in plan {
                    for (page, file) in run.window.pages().zip(run.file.0..) {
                        let shown = Shown::File(FilePage(file));
                        table.set(page, Entry::new(shown, Prot::Read));
                    }
                    assert!(boundaries(&table, whole) <= bound);
                }
            }
        }
    }
}
