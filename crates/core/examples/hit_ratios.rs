//! Which pages should be evicted from a full window? Policies replayed over traces.
//!
//! Hits in a window are invisible: fremap only sees pages come in. `fifo`, `random`, `2q` and
//! `standby` see what fremap can see; `cache`, with its batches, is fremap's policy. For
//! comparison, `lru`, `clock`, `sieve` and `s3fifo` see every access, and `opt` knows the future.
//!
//! `cargo run --release -p fremap-core --example hit_ratios`
//!
//! For each size, trace and policy it prints misses in 100 accesses, soft faults in 100 accesses
//! if there is a standby, and the estimated price of an access. Seeds are fixed, so each run
//! prints the same.

use std::collections::{BinaryHeap, VecDeque};

use fremap_core::cache::Cache;
use fremap_core::units::{FilePage, WindowPage};

/// Pages of the file.
const FILE_PAGES: usize = 1 << 16;
/// Accesses of a trace, the first fifth of which is not counted.
const ACCESSES: usize = 500_000;
const WARM_UP: usize = ACCESSES / 5;
/// Pages that a trace can name: those of the file, of a loop beside it, of scans.
const PAGES: usize = FILE_PAGES * 2 + ACCESSES;
/// What things cost, in microseconds: a fault with its I/O, a fault that finds its
/// frame in the standby, and taking a page out of the window.
const MISS_US: f64 = 30.0;
const SOFT_US: f64 = 8.0;
const TAKE_OUT_US: f64 = 1.2;

/// Splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        f64::from((self.next() >> 32) as u32) / f64::from(u32::MAX)
    }
}

/// Pages of the file, page `i` (in a scattered order) weighing `1 / (i + 1)^alpha`.
struct Zipf {
    cumulated: Vec<f64>,
    pages: Vec<u32>,
}

impl Zipf {
    fn new(alpha: f64, random: &mut Random) -> Self {
        let mut sum = 0.0;
        let weights = (1..=FILE_PAGES as u32).map(|rank| f64::from(rank).powf(-alpha));
        let cumulated = weights
            .map(|weight| {
                sum += weight;
                sum
            })
            .collect();
        let mut zipf = Self { cumulated, pages: (0..FILE_PAGES as u32).collect() };
        zipf.shuffle(random);
        zipf
    }

    fn shuffle(&mut self, random: &mut Random) {
        for index in (1..self.pages.len()).rev() {
            self.pages.swap(index, random.below(index + 1));
        }
    }

    fn draw(&self, random: &mut Random) -> u32 {
        let wanted = random.unit() * self.cumulated.last().expect("not empty");
        let rank = self.cumulated.partition_point(|&sum| sum < wanted);
        self.pages[rank.min(FILE_PAGES - 1)]
    }
}

/// The traces, by name.
///
/// `short loop`: over a quarter of the file. `scans`: of 20 000 pages that are never
/// seen again, after every 20 000 other accesses. `loop` beside Zipf: every other
/// access, over as many pages again. `shifts`: other pages are hot after 50 000.
fn traces() -> Vec<(&'static str, Vec<u32>)> {
    let mut random = Random(2002);
    let mut all = Vec::new();
    for (name, alpha) in
        [("zipf 0.6", 0.6), ("zipf 0.8", 0.8), ("zipf 1.0", 1.0), ("zipf 1.2", 1.2)]
    {
        let zipf = Zipf::new(alpha, &mut random);
        all.push((name, (0..ACCESSES).map(|_| zipf.draw(&mut random)).collect()));
    }
    all.push(("uniform", (0..ACCESSES).map(|_| random.below(FILE_PAGES) as u32).collect()));
    let short = FILE_PAGES / 4;
    all.push(("short loop", (0..ACCESSES).map(|access| (access % short) as u32).collect()));
    all.push(("loop", (0..ACCESSES).map(|access| (access % FILE_PAGES) as u32).collect()));
    let mut zipf = Zipf::new(1.0, &mut random);
    let scans = (0..ACCESSES).map(|access| match access / 20_000 % 2 {
        0 => zipf.draw(&mut random),
        _ => (FILE_PAGES + access) as u32,
    });
    all.push(("zipf 1.0, scans", scans.collect()));
    let mixed = (0..ACCESSES).map(|access| match access % 2 {
        0 => zipf.draw(&mut random),
        _ => (FILE_PAGES + access / 2 % FILE_PAGES) as u32,
    });
    all.push(("zipf 1.0 + loop", mixed.collect()));
    let mut shifting = Vec::with_capacity(ACCESSES);
    for access in 0..ACCESSES {
        if access % 50_000 == 0 {
            zipf.shuffle(&mut random);
        }
        shifting.push(zipf.draw(&mut random));
    }
    all.push(("zipf 1.0, shifts", shifting));
    all
}

/// What an access met.
#[derive(Clone, Copy, PartialEq)]
enum Met {
    Hit,
    /// The frame was in the standby.
    Soft,
    Miss,
}

impl Met {
    fn hit(hit: bool) -> Self {
        if hit {
            Self::Hit
        } else {
            Self::Miss
        }
    }
}

trait Policy {
    fn access(&mut self, page: u32) -> Met;

    /// Pages taken out of the window so far, whether or not they came back.
    fn taken_out(&self) -> u32;
}

/// Where a page is, for those that see no hits.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Out,
    Probation,
    Main,
    Standby,
}

/// What fremap could do: FIFO queues, perhaps ghosts, perhaps a standby.
struct Unseeing {
    place: Vec<Place>,
    /// Probation, main, standby.
    queues: [VecDeque<u32>; 3],
    dropped_at: Vec<Option<usize>>,
    resident: usize,
    probation: usize,
    ghosts: usize,
    standby: usize,
    /// Which queues a random page leaves, not the oldest.
    random: [bool; 2],
    draws: Random,
    taken_out: u32,
    dropped: usize,
}

impl Unseeing {
    /// Each page is like every other.
    fn one_queue(capacity: usize, standby: usize, random: bool) -> Self {
        Self {
            place: vec![Place::Out; PAGES],
            queues: Default::default(),
            dropped_at: vec![None; PAGES],
            resident: capacity - standby,
            probation: capacity,
            ghosts: 0,
            standby,
            random: [random; 2],
            draws: Random(1),
            taken_out: 0,
            dropped: 0,
        }
    }

    /// A tenth on probation, as many ghosts as pages.
    fn two_queues(capacity: usize, standby: usize, random: bool) -> Self {
        let one = Self::one_queue(capacity, standby, false);
        Self { probation: capacity / 10, ghosts: capacity, random: [false, random], ..one }
    }

    fn push(&mut self, page: u32, place: Place) {
        self.place[page as usize] = place;
        self.queues[place as usize - 1].push_back(page);
    }

    fn take_out(&mut self) {
        let long = self.queues[0].len() >= self.probation.max(1);
        let from = usize::from(!long && !self.queues[1].is_empty());
        let from = if self.queues[from].is_empty() { 1 - from } else { from };
        let index = if self.random[from] { self.draws.below(self.queues[from].len()) } else { 0 };
        let page = self.queues[from].swap_remove_front(index).expect("a page to take out");
        self.taken_out += 1;
        self.push(page, Place::Standby);
        if self.queues[2].len() > self.standby {
            let page = self.queues[2].pop_front().expect("one too many") as usize;
            self.place[page] = Place::Out;
            self.dropped_at[page] = Some(self.dropped);
            self.dropped += 1;
        }
    }
}

impl Policy for Unseeing {
    fn access(&mut self, page: u32) -> Met {
        let dropped_at = self.dropped_at[page as usize];
        let mut known = dropped_at.is_some_and(|at| self.dropped - at <= self.ghosts);
        let met = match self.place[page as usize] {
            Place::Probation | Place::Main => return Met::Hit,
            Place::Standby => {
                let index = self.queues[2].iter().position(|&other| other == page);
                self.queues[2].remove(index.expect("in the standby"));
                known = true;
                Met::Soft
            }
            Place::Out => Met::Miss,
        };
        if self.queues[0].len() + self.queues[1].len() >= self.resident {
            self.take_out();
        }
        known &= self.ghosts > 0;
        self.push(page, if known { Place::Main } else { Place::Probation });
        met
    }

    fn taken_out(&self) -> u32 {
        self.taken_out
    }
}

/// What fremap has.
struct Chosen {
    cache: Cache,
    batch: usize,
    out: Vec<WindowPage>,
    taken_out: u32,
}

impl Chosen {
    fn new(capacity: usize, batch: Option<usize>) -> Self {
        let cache = Cache::new(capacity as u64).expect("memory");
        let batch = batch.unwrap_or(cache.batch_pages());
        Self { cache, batch, out: Vec::new(), taken_out: 0 }
    }
}

impl Policy for Chosen {
    fn access(&mut self, page: u32) -> Met {
        let (window_page, file_page) = (WindowPage(page.into()), FilePage(page.into()));
        if self.cache.contains(window_page) {
            return Met::Hit;
        }
        if self.cache.excess(1) > 0 {
            self.out.clear();
            self.cache.victims(self.batch, |page| Some(FilePage(page.0)), &mut self.out);
            self.taken_out += self.out.len() as u32;
        }
        self.cache.inserted(window_page, file_page);
        Met::Miss
    }

    fn taken_out(&self) -> u32 {
        self.taken_out
    }
}

/// The pages that are in, with a number each, for those that see hits.
struct Seen {
    used: Vec<Option<u32>>,
    len: usize,
    capacity: usize,
    taken_out: u32,
}

impl Seen {
    fn new(capacity: usize) -> Self {
        Self { used: vec![None; PAGES], len: 0, capacity, taken_out: 0 }
    }

    fn full(&self) -> bool {
        self.len >= self.capacity
    }

    fn add(&mut self, page: u32, used: u32) {
        self.used[page as usize] = Some(used);
        self.len += 1;
    }

    fn drop(&mut self, page: u32) {
        self.used[page as usize] = None;
        self.len -= 1;
        self.taken_out += 1;
    }
}

/// The page that was not used for longest leaves.
struct Lru {
    seen: Seen,
    /// Uses, the oldest first, with their time; only the last of a page counts.
    uses: VecDeque<(u32, u32)>,
    now: u32,
}

impl Policy for Lru {
    fn access(&mut self, page: u32) -> Met {
        self.now += 1;
        let hit = self.seen.used[page as usize].is_some();
        while !hit && self.seen.full() {
            let (oldest, time) = self.uses.pop_front().expect("a use");
            if self.seen.used[oldest as usize] == Some(time) {
                self.seen.drop(oldest);
            }
        }
        self.seen.len -= usize::from(hit);
        self.seen.add(page, self.now);
        self.uses.push_back((page, self.now));
        Met::hit(hit)
    }

    fn taken_out(&self) -> u32 {
        self.seen.taken_out
    }
}

/// CLOCK and SIEVE: a hand passes over pages that were used. With CLOCK new pages
/// are behind the hand, with SIEVE at the head of the queue.
struct Hand {
    seen: Seen,
    /// From the hand to the head, and from the tail to the hand.
    ahead: VecDeque<u32>,
    passed: VecDeque<u32>,
    sieve: bool,
}

impl Hand {
    fn new(capacity: usize, sieve: bool) -> Self {
        let (ahead, passed) = Default::default();
        Self { seen: Seen::new(capacity), ahead, passed, sieve }
    }
}

impl Policy for Hand {
    fn access(&mut self, page: u32) -> Met {
        if let Some(used) = &mut self.seen.used[page as usize] {
            *used = 1;
            return Met::Hit;
        }
        while self.seen.full() {
            if self.ahead.is_empty() {
                std::mem::swap(&mut self.ahead, &mut self.passed);
            }
            let next = self.ahead.pop_front().expect("a full cache");
            if self.seen.used[next as usize] == Some(0) {
                self.seen.drop(next);
            } else {
                self.seen.used[next as usize] = Some(0);
                self.passed.push_back(next);
            }
        }
        self.seen.add(page, 0);
        let queue = if self.sieve { &mut self.ahead } else { &mut self.passed };
        queue.push_back(page);
        Met::Miss
    }

    fn taken_out(&self) -> u32 {
        self.seen.taken_out
    }
}

/// S3-FIFO, with its tenth and as many ghosts as pages in its main queue.
struct S3Fifo {
    seen: Seen,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    dropped_at: Vec<Option<usize>>,
    dropped: usize,
}

impl S3Fifo {
    fn take_out(&mut self) {
        let capacity = self.seen.capacity;
        let small = self.small.len() > capacity / 10 || self.main.is_empty();
        let queue = if small { &mut self.small } else { &mut self.main };
        let page = queue.pop_front().expect("a full cache");
        let used = self.seen.used[page as usize].expect("a page that is in");
        if small && used <= 1 {
            self.seen.drop(page);
            self.dropped_at[page as usize] = Some(self.dropped);
            self.dropped += 1;
        } else if !small && used == 0 {
            self.seen.drop(page);
        } else {
            self.seen.used[page as usize] = Some(if small { 0 } else { used - 1 });
            self.main.push_back(page);
        }
    }
}

impl Policy for S3Fifo {
    fn access(&mut self, page: u32) -> Met {
        if let Some(used) = &mut self.seen.used[page as usize] {
            *used = 3.min(*used + 1);
            return Met::Hit;
        }
        while self.seen.full() {
            self.take_out();
        }
        let dropped_at = self.dropped_at[page as usize];
        let known = dropped_at.is_some_and(|at| self.dropped - at <= self.seen.capacity * 9 / 10);
        self.seen.add(page, 0);
        let queue = if known { &mut self.main } else { &mut self.small };
        queue.push_back(page);
        Met::Miss
    }

    fn taken_out(&self) -> u32 {
        self.seen.taken_out
    }
}

/// Belady: the page leaves that will not be used for longest.
struct Opt {
    seen: Seen,
    /// When the page of each access is used again.
    next: Vec<u32>,
    now: usize,
    uses: BinaryHeap<(u32, u32)>,
}

impl Opt {
    fn new(capacity: usize, trace: &[u32]) -> Self {
        let mut last = vec![u32::MAX; PAGES];
        let times = (0..trace.len() as u32).rev();
        let again = |(&page, time): (&u32, u32)| std::mem::replace(&mut last[page as usize], time);
        let mut next: Vec<_> = trace.iter().rev().zip(times).map(again).collect();
        next.reverse();
        Self { seen: Seen::new(capacity), next, now: 0, uses: BinaryHeap::new() }
    }
}

impl Policy for Opt {
    fn access(&mut self, page: u32) -> Met {
        let hit = self.seen.used[page as usize].is_some();
        while !hit && self.seen.full() {
            let (time, latest) = self.uses.pop().expect("a use");
            if self.seen.used[latest as usize] == Some(time) {
                self.seen.drop(latest);
            }
        }
        self.seen.len -= usize::from(hit);
        let again = self.next[self.now];
        self.seen.add(page, again);
        self.uses.push((again, page));
        self.now += 1;
        Met::hit(hit)
    }

    fn taken_out(&self) -> u32 {
        self.seen.taken_out
    }
}

/// Every policy, by name.
fn policies(capacity: usize, trace: &[u32]) -> Vec<(&'static str, Box<dyn Policy>)> {
    let seen = || Seen::new(capacity);
    let lru = Lru { seen: seen(), uses: VecDeque::new(), now: 0 };
    let s3fifo = S3Fifo {
        seen: seen(),
        small: VecDeque::new(),
        main: VecDeque::new(),
        dropped_at: vec![None; PAGES],
        dropped: 0,
    };
    let standby = capacity / 10;
    vec![
        ("fifo", Box::new(Unseeing::one_queue(capacity, 0, false))),
        ("random", Box::new(Unseeing::one_queue(capacity, 0, true))),
        ("2q fifo", Box::new(Unseeing::two_queues(capacity, 0, false))),
        ("cache/1", Box::new(Chosen::new(capacity, Some(1)))),
        ("cache", Box::new(Chosen::new(capacity, None))),
        ("cache/64", Box::new(Chosen::new(capacity, Some(64)))),
        ("fifo+st", Box::new(Unseeing::one_queue(capacity, standby, false))),
        ("2q+st", Box::new(Unseeing::two_queues(capacity, standby, true))),
        ("lru", Box::new(lru)),
        ("clock", Box::new(Hand::new(capacity, false))),
        ("sieve", Box::new(Hand::new(capacity, true))),
        ("s3fifo", Box::new(s3fifo)),
        ("opt", Box::new(Opt::new(capacity, trace))),
    ]
}

/// What a policy did, an access.
struct Outcome {
    misses: f64,
    soft_faults: f64,
    price_us: f64,
}

fn replay(policy: &mut dyn Policy, trace: &[u32]) -> Outcome {
    let (warm_up, counted) = trace.split_at(WARM_UP);
    for &page in warm_up {
        policy.access(page);
    }
    let before = policy.taken_out();
    let (mut misses, mut soft_faults) = (0u32, 0u32);
    for &page in counted {
        let met = policy.access(page);
        misses += u32::from(met == Met::Miss);
        soft_faults += u32::from(met == Met::Soft);
    }
    let each = |count: u32| f64::from(count) / f64::from(counted.len() as u32);
    let (misses, soft_faults) = (each(misses), each(soft_faults));
    let taken_out = each(policy.taken_out() - before);
    let price_us = misses * MISS_US + soft_faults * SOFT_US + taken_out * TAKE_OUT_US;
    Outcome { misses, soft_faults, price_us }
}

fn print_table(title: &str, names: &[&str], rows: &[(&str, Vec<f64>)], digits: usize) {
    print!("\n{title:<17}");
    for name in names {
        print!(" {name:>8}");
    }
    println!();
    for (trace, row) in rows {
        print!("{trace:<17}");
        for value in row {
            print!(" {value:>8.digits$}");
        }
        println!();
    }
}

fn main() {
    let traces = traces();
    for percent in [1, 5, 20] {
        let capacity = FILE_PAGES * percent / 100;
        println!("\nThe budget is {capacity} of {FILE_PAGES} pages ({percent} %)");
        let (mut misses, mut soft_faults, mut prices) = (Vec::new(), Vec::new(), Vec::new());
        let mut names = Vec::new();
        for (name, trace) in &traces {
            let (labels, outcomes): (Vec<_>, Vec<_>) = policies(capacity, trace)
                .into_iter()
                .map(|(label, mut policy)| (label, replay(policy.as_mut(), trace)))
                .unzip();
            names = labels;
            misses.push((*name, outcomes.iter().map(|of| of.misses * 100.0).collect()));
            let standby = |(of, label): (&Outcome, &&str)| {
                label.ends_with("+st").then_some(of.soft_faults * 100.0)
            };
            soft_faults.push((*name, outcomes.iter().zip(&names).filter_map(standby).collect()));
            prices.push((*name, outcomes.iter().map(|of| of.price_us).collect()));
        }
        print_table("misses, %", &names, &misses, 1);
        print_table("price, us", &names, &prices, 2);
        let with_standby: Vec<_> =
            names.iter().copied().filter(|name| name.ends_with("+st")).collect();
        print_table("soft faults, %", &with_standby, &soft_faults, 1);
    }
}
