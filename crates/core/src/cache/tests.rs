use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use super::*;

fn page(number: u64) -> WindowPage {
    WindowPage(number)
}

/// In these tests window page i shows file page i, unless they say otherwise.
#[allow(clippy::unnecessary_wraps)] // an answer of `victims`
fn same(page: WindowPage) -> Option<FilePage> {
    Some(FilePage(page.0))
}

fn new(capacity_pages: u64) -> Cache {
    Cache::new(capacity_pages).unwrap()
}

fn insert(cache: &mut Cache, pages: impl IntoIterator<Item = u64>) {
    for number in pages {
        cache.inserted(page(number), FilePage(number));
    }
}

fn victims(
    cache: &mut Cache,
    count: usize,
    shows: impl Fn(WindowPage) -> Option<FilePage>,
) -> Vec<u64> {
    let mut out = Vec::new();
    cache.victims(count, shows, &mut out);
    out.into_iter().map(|page| page.0).collect()
}

/// As an engine does it: pages leave in batches before one that is not in comes.
fn access(cache: &mut Cache, number: u64) -> bool {
    let hit = cache.contains(page(number));
    if !hit {
        if cache.excess(1) > 0 {
            victims(cache, cache.batch_pages(), same);
        }
        insert(cache, [number]);
    }
    hit
}

/// Each slot of a queue is found by its number, and nothing else is.
fn check(cache: &Cache) {
    let mut numbers = BTreeSet::new();
    for (queue, stretch) in
        [(Queue::Probation, cache.probation), (Queue::Protected, cache.protected)]
    {
        for offset in 0..stretch.len {
            let slot = cache.after(stretch.start, offset);
            assert_eq!(cache.queue_of(slot), queue);
            assert_eq!(cache.find(page(cache.slots[slot].into())), Some(slot));
            assert!(numbers.insert(cache.slots[slot]), "a page has one slot");
        }
    }
    assert_eq!(numbers.len(), cache.count());
}

#[test]
fn who_was_on_probation_longest_leaves_first() {
    let mut cache = new(100);
    insert(&mut cache, 0..100);
    assert_eq!(victims(&mut cache, 5, same), [0, 1, 2, 3, 4]);
    assert_eq!(cache.len(), 95);
    assert_eq!((cache.excess(5), cache.excess(7)), (0, 2));
}

#[test]
fn who_comes_back_while_remembered_is_protected_and_stays() {
    let mut cache = new(100);
    insert(&mut cache, 0..100);
    assert_eq!(victims(&mut cache, 3, same), [0, 1, 2]);
    insert(&mut cache, [1, 200, 201]);
    // 99 pages on probation leave before page 1 does, but for a tenth of the budget.
    let left = victims(&mut cache, 89, same);
    assert!(!left.contains(&1));
    assert_eq!(victims(&mut cache, 1, same), [1]);
}

#[test]
fn a_ghost_is_a_file_page_wherever_it_is_shown() {
    let mut cache = new(20);
    cache.inserted(page(3), FilePage(77));
    assert_eq!(victims(&mut cache, 1, |_| Some(FilePage(77))), [3]);
    cache.inserted(page(9), FilePage(77));
    cache.inserted(page(3), FilePage(78));
    assert_eq!((cache.protected.len, cache.probation.len), (1, 1));
}

#[test]
fn a_page_that_a_call_names_is_protected() {
    let mut cache = new(10);
    insert(&mut cache, 0..10);
    cache.touched(page(0));
    cache.touched(page(0));
    cache.touched(page(99));
    assert_eq!(victims(&mut cache, 9, same)[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
    check(&cache);
}

#[test]
fn removed_pages_are_never_offered_nor_remembered() {
    let mut cache = new(10);
    insert(&mut cache, 0..10);
    assert!(cache.removed(page(4)));
    assert!(!cache.removed(page(4)));
    assert!(!cache.removed(page(1 << 40)));
    insert(&mut cache, [4]);
    assert_eq!(cache.protected.len, 0);
    assert!(cache.removed(page(4)));
    let mut left = victims(&mut cache, 100, same);
    left.sort_unstable();
    assert_eq!(left, [0, 1, 2, 3, 5, 6, 7, 8, 9]);
}

#[test]
fn a_page_that_shows_something_else_is_in_once() {
    let mut cache = new(10);
    cache.inserted(page(1), FilePage(5));
    cache.inserted(page(1), FilePage(6));
    assert_eq!(cache.len(), 1);
    assert_eq!(victims(&mut cache, 10, same), [1]);
    assert!(cache.is_empty());
}

#[test]
fn pinned_pages_stay_and_each_other_page_is_offered() {
    let mut cache = new(1000);
    insert(&mut cache, 0..1000);
    (0..1000).step_by(2).for_each(|number| cache.touched(page(number)));
    let asked = RefCell::new(BTreeMap::new());
    let free = |page: WindowPage| {
        *asked.borrow_mut().entry(page.0).or_insert(0) += 1;
        (!page.0.is_multiple_of(3)).then_some(FilePage(page.0))
    };
    let mut left = victims(&mut cache, 1000, free);
    left.sort_unstable();
    assert_eq!(left, (0..1000).filter(|number| number % 3 != 0).collect::<Vec<_>>());
    assert!(asked.into_inner().into_values().all(|times| times <= 3));
    assert_eq!(victims(&mut cache, 10, |_| None), [0; 0]);
    assert_eq!(cache.len(), 334);
    check(&cache);
}

#[test]
fn few_pinned_pages_cost_few_questions() {
    let mut cache = new(10_000);
    insert(&mut cache, 0..10_000);
    let asked = Cell::new(0);
    let free = |page: WindowPage| {
        asked.set(asked.get() + 1);
        (!page.0.is_multiple_of(10)).then_some(FilePage(page.0))
    };
    assert_eq!(victims(&mut cache, 64, free).len(), 64);
    assert!(asked.get() < 80);
}

#[test]
fn a_scan_leaves_in_order_and_displaces_a_tenth() {
    let mut cache = new(1000);
    for _ in 0..3 {
        // 1100 pages in turn: they are learnt to be wanted again.
        for number in 0..1100 {
            access(&mut cache, number);
        }
    }
    let hot: Vec<_> = (0..1100).filter(|&number| cache.contains(page(number))).collect();
    assert!(cache.protected.len >= 800);
    (10_000..110_000).for_each(|number| assert!(!access(&mut cache, number)));
    let kept = hot.iter().filter(|&&number| cache.contains(page(number))).count();
    assert!(kept >= 800, "{kept} of {} stayed", hot.len());
    let left = victims(&mut cache, 4, same);
    assert!(left.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{left:?} in a row");
}

#[test]
fn a_hot_set_that_changes_is_learnt_anew() {
    let mut cache = new(1000);
    for first in [0, 5000] {
        for _ in 0..20 {
            for number in first..first + 900 {
                access(&mut cache, number);
            }
        }
        let hits = (first..first + 900).filter(|&number| access(&mut cache, number)).count();
        assert!(hits > 700, "{hits} of 900 hit");
    }
}

#[test]
fn memory_is_bounded_and_grows_only_when_told() {
    let mut cache = new(1 << 16);
    let bytes = cache.bytes();
    assert!(bytes <= (12 << 16) + 10 * SPARE_PAGES as u64 + 64, "{bytes} bytes");
    let mut out = Vec::with_capacity(64);
    for number in 0..1 << 18 {
        if cache.excess(1) > 0 {
            out.clear();
            cache.victims(64, same, &mut out);
        }
        insert(&mut cache, [number]);
    }
    assert_eq!((cache.bytes(), out.capacity()), (bytes, 64));
}

#[test]
#[should_panic(expected = "pages leave before others come")]
fn there_is_an_end_to_what_finds_room() {
    insert(&mut new(10), 0..=10 + SPARE_PAGES as u64);
}

#[test]
fn another_budget_keeps_what_is_in_and_its_order() {
    let mut cache = new(100);
    insert(&mut cache, 0..100);
    assert_eq!(victims(&mut cache, 30, same).len(), 30);
    insert(&mut cache, 29..40);
    cache.resize(40).unwrap();
    assert_eq!((cache.len(), cache.excess(0)), (71, 31));
    check(&cache);
    cache.reserve(5000).unwrap();
    insert(&mut cache, 1000..6000);
    check(&cache);
    cache.resize(1 << 20).unwrap();
    check(&cache);
    assert!(cache.contains(page(5999)) && cache.contains(page(29)));
}

#[test]
fn a_budget_of_nothing_lets_all_leave() {
    let mut cache = new(0);
    insert(&mut cache, 0..3);
    assert_eq!(cache.excess(0), 3);
    assert_eq!(victims(&mut cache, 9, same), [0, 1, 2]);
    assert_eq!(cache.batch_pages(), 1);
}

/// Random calls beside a plain model: the pages that are in, and what they show.
#[test]
fn it_agrees_with_a_model_whatever_is_called() {
    for seed in 0..30 {
        let mut draws = seed << 32;
        let mut draw = |limit: usize| {
            draws += 1;
            below(mix(draws), limit) as u64
        };
        let capacity = 1 + draw(300);
        let mut cache = new(capacity);
        let mut model = BTreeMap::new();
        for step in 0..3000 {
            let number = draw(600);
            match draw(10) {
                0..=4 if model.len() < (capacity as usize + SPARE_PAGES).min(550) => {
                    let shown = FilePage(draw(800));
                    cache.inserted(page(number), shown);
                    model.insert(number, shown);
                }
                5 => assert_eq!(cache.removed(page(number)), model.remove(&number).is_some()),
                6 => cache.touched(page(number)),
                7 if step % 50 == 0 => cache.resize(draw(300).max(capacity)).unwrap(),
                _ => {
                    let pinned = 1 + draw(5);
                    let count = draw(20) as usize;
                    let free = |page: WindowPage| (page.0 % 5 >= pinned).then(|| model[&page.0]);
                    let may_leave = model.keys().filter(|&number| number % 5 >= pinned).count();
                    let left = victims(&mut cache, count, free);
                    assert_eq!(left.len(), count.min(may_leave));
                    for number in left {
                        assert!(number % 5 >= pinned, "pinned pages stay");
                        assert!(model.remove(&number).is_some(), "offered once, while it is in");
                    }
                }
            }
            assert_eq!(cache.len(), model.len() as u64);
            assert_eq!(cache.contains(page(number)), model.contains_key(&number));
            if step % 16 == 0 {
                check(&cache);
            }
        }
        let mut drained = victims(&mut cache, usize::MAX, |page| Some(model[&page.0]));
        drained.sort_unstable();
        assert_eq!(drained, model.into_keys().collect::<Vec<_>>());
        assert!(cache.is_empty());
    }
}
