use super::*;

fn shown(table: &Table, page: u64) -> i64 {
    table.get(WindowPage(page)).shown().number()
}

#[test]
fn a_linear_window_costs_a_bit_every_512_pages() {
    let table = Table::new(1 << 22, Origin::Linear(FilePage(7)), Prot::Read).unwrap();
    assert_eq!(shown(&table, 0), 7);
    assert_eq!(shown(&table, (1 << 22) - 1), 7 + (1 << 22) - 1);
    assert_eq!(table.bytes(), (1 << 22) / 512 / 8);
}

#[test]
fn a_fully_remapped_window_stays_below_16_bytes_a_page() {
    let mut table = Table::new(4096, Origin::Nothing, Prot::Read).unwrap();
    for page in 0..4096 {
        table.set(WindowPage(page), Entry::new(Shown::File(FilePage(4095 - page)), Prot::Read));
    }
    assert!(table.bytes() <= 4096 * 16);
    assert_eq!(shown(&table, 0), 4095);
    assert_eq!(shown(&table, 4095), 0);
}

#[test]
fn changing_a_page_leaves_its_neighbours() {
    let mut table = Table::new(700, Origin::Linear(FilePage(0)), Prot::Read).unwrap();
    table.set(WindowPage(513), Entry::new(Shown::Placed, Prot::Read));
    assert_eq!([512, 513, 514, 699].map(|page| shown(&table, page)), [512, -2, 514, 699]);
}

#[test]
fn counts_follow_every_change() {
    let mut table = Table::new(10, Origin::Linear(FilePage(0)), Prot::Read).unwrap();
    let page = WindowPage(3);
    table.update(page, Entry::finish_load);
    assert_eq!(table.counts(), Counts { present: 1, ..Counts::default() });
    table.update(page, |entry| entry.finish_drop().with_prot(Prot::None));
    assert_eq!(table.counts(), Counts { denied: 1, ..Counts::default() });
    table.set(page, Entry::new(Shown::Placed, Prot::Read).finish_load());
    assert_eq!(table.counts(), Counts { present: 1, placed: 1, ..Counts::default() });
    table.set(page, Entry::new(Shown::File(FilePage(3)), Prot::Write).finish_load());
    table.update(page, Entry::note_write);
    assert_eq!(table.counts(), Counts { present: 1, dirty: 1, ..Counts::default() });
    table.update(page, Entry::begin_writeback);
    assert_eq!(table.counts(), Counts { present: 1, dirty: 1, ..Counts::default() });
    table.update(page, Entry::finish_drop);
    assert_eq!(table.counts(), Counts::default());
}

fn used_ranges(table: &Table, pages: Range<u64>, most: u64) -> Vec<Range<u64>> {
    table.used_ranges("flush", pages, most).unwrap()
}

#[test]
fn only_blocks_in_use_are_looked_at() {
    let mut table = Table::new(5000, Origin::Linear(FilePage(0)), Prot::Write).unwrap();
    assert_eq!(used_ranges(&table, 0..5000, 4096), []);
    table.update(WindowPage(600), Entry::finish_load);
    table.update(WindowPage(1024), Entry::hold);
    table.update(WindowPage(4999), |entry| entry.finish_load().note_write());
    assert_eq!(used_ranges(&table, 0..5000, 4096), [512..1536, 4608..5000]);
    assert_eq!(used_ranges(&table, 700..4999, 512), [700..1024, 1024..1536, 4608..4999]);
    table.update(WindowPage(600), Entry::finish_drop);
    assert_eq!(used_ranges(&table, 0..1024, 4096), []);
}

#[test]
fn present_pages_are_told_a_buffer_at_a_time() {
    let mut table = Table::new(5000, Origin::Linear(FilePage(0)), Prot::Write).unwrap();
    let here = [3, 4, 1024, 4999].map(WindowPage);
    for page in here {
        table.update(page, Entry::finish_load);
    }
    let (mut told, mut from) = (Vec::new(), Some(WindowPage(0)));
    while let Some(start) = from {
        let mut buffer = Vec::with_capacity(3);
        from = table.present_pages(start, &mut buffer);
        told.extend(buffer);
    }
    assert_eq!(told, here);
}

#[test]
fn pages_that_change_state_alone_are_not_listed() {
    let table = Table::new(1 << 20, Origin::Linear(FilePage(0)), Prot::Write).unwrap();
    let mut table = table.with_appearances().unwrap();
    let before = table.bytes();
    for page in 0..100 {
        table.update(WindowPage(page), Entry::finish_load);
    }
    assert_eq!(table.bytes(), before + 512 * 8);
    assert_eq!(appearances(&table, 7), [7]);
    table.reserve_moves("remap", [WindowPage(7)]).unwrap();
    table.set(WindowPage(7), Entry::new(Shown::File(FilePage(9)), Prot::Write));
    assert_eq!((appearances(&table, 7), appearances(&table, 9)), (vec![], vec![7, 9]));
}

fn appearances(table: &Table, page: u64) -> Vec<u64> {
    let mut found: Vec<u64> = table.appearances(FilePage(page)).map(|page| page.0).collect();
    found.sort_unstable();
    found
}

#[test]
fn a_file_page_is_found_where_it_is_shown() {
    let mut table = Table::new(2000, Origin::Linear(FilePage(10)), Prot::Write)
        .unwrap()
        .with_appearances()
        .unwrap();
    assert_eq!(appearances(&table, 1510), [1500], "nothing was changed there");
    assert_eq!(appearances(&table, 9), []);
    assert_eq!(appearances(&table, 2010), []);
    table.set(WindowPage(3), Entry::new(Shown::File(FilePage(1510)), Prot::Read));
    assert_eq!(appearances(&table, 1510), [3, 1500]);
    assert_eq!(appearances(&table, 13), [], "it was shown there before");
    assert_eq!(appearances(&table, 14), [4], "its block was changed, not its page");
    table.set(WindowPage(1500), Entry::new(Shown::Placed, Prot::Write));
    table.set(WindowPage(3), Entry::new(Shown::File(FilePage(1510)), Prot::Write));
    assert_eq!(appearances(&table, 1510), [3]);
}

#[test]
fn appearances_follow_any_changes() {
    const PAGES: u64 = 1500;
    let mut table =
        Table::new(PAGES, Origin::Nothing, Prot::Write).unwrap().with_appearances().unwrap();
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    for _ in 0..20_000 {
        let shown = match random(8) {
            0 => Shown::Nothing,
            1 => Shown::Placed,
            _ => Shown::File(FilePage(random(300))),
        };
        table.set(WindowPage(random(PAGES)), Entry::new(shown, Prot::Write));
    }
    for page in 0..300 {
        let shows = |&index: &u64| shown(&table, index).cast_unsigned() == page;
        assert_eq!(appearances(&table, page), (0..PAGES).filter(shows).collect::<Vec<_>>());
    }
    assert!(table.bytes() <= PAGES * 24);
}

#[test]
#[should_panic(expected = "present without access")]
fn a_page_without_access_cannot_be_present() {
    let mut table = Table::new(1, Origin::Nothing, Prot::Read).unwrap();
    table.set(WindowPage(0), Entry::new(Shown::Nothing, Prot::None).finish_load());
}
