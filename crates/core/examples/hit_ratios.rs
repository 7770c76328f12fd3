//! Which pages should be evicted from a full window? Policies replayed over traces.
//!
//! Hits in a window are invisible: fremap only sees pages come in. `fifo` sees no more than that;
//! `cache`, with its batches, is fremap's policy. For comparison, `s3fifo` sees every access, and
//! `opt` knows the future.
//!
//! `cargo run --release -p fremap-core --example hit_ratios`
//!
//! For each size, trace and policy it prints misses in 100 accesses. Seeds are fixed, so each run
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

trait Policy {
    /// Whether a page is in; it is afterwards.
    fn access(&mut self, page: u32) -> bool;
}

/// The page leaves that came first.
struct Fifo {
    seen: Seen,
    queue: VecDeque<u32>,
}

impl Policy for Fifo {
    fn access(&mut self, page: u32) -> bool {
        if self.seen.used[page as usize].is_some() {
            return true;
        }
        if self.seen.full() {
            self.seen.drop(self.queue.pop_front().expect("a full cache"));
        }
        self.seen.add(page, 0);
        self.queue.push_back(page);
        false
    }
}

/// What fremap has.
struct Chosen {
    cache: Cache,
    batch: usize,
    out: Vec<WindowPage>,
}

impl Chosen {
    fn new(capacity: usize, batch: Option<usize>) -> Self {
        let cache = Cache::new(capacity as u64).expect("memory");
        let batch = batch.unwrap_or(cache.batch_pages());
        Self { cache, batch, out: Vec::new() }
    }
}

impl Policy for Chosen {
    fn access(&mut self, page: u32) -> bool {
        let (window_page, file_page) = (WindowPage(page.into()), FilePage(page.into()));
        if self.cache.contains(window_page) {
            return true;
        }
        if self.cache.excess(1) > 0 {
            self.out.clear();
            self.cache.victims(self.batch, |page| Some(FilePage(page.0)), &mut self.out);
        }
        self.cache.inserted(window_page, file_page);
        false
    }
}

/// The pages that are in, with a number each, for those that see hits.
struct Seen {
    used: Vec<Option<u32>>,
    len: usize,
    capacity: usize,
}

impl Seen {
    fn new(capacity: usize) -> Self {
        Self { used: vec![None; PAGES], len: 0, capacity }
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
    fn access(&mut self, page: u32) -> bool {
        if let Some(used) = &mut self.seen.used[page as usize] {
            *used = 3.min(*used + 1);
            return true;
        }
        while self.seen.full() {
            self.take_out();
        }
        let dropped_at = self.dropped_at[page as usize];
        let known = dropped_at.is_some_and(|at| self.dropped - at <= self.seen.capacity * 9 / 10);
        self.seen.add(page, 0);
        let queue = if known { &mut self.main } else { &mut self.small };
        queue.push_back(page);
        false
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
    fn access(&mut self, page: u32) -> bool {
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
        hit
    }
}

/// Every policy, by name.
fn policies(capacity: usize, trace: &[u32]) -> Vec<(&'static str, Box<dyn Policy>)> {
    let s3fifo = S3Fifo {
        seen: Seen::new(capacity),
        small: VecDeque::new(),
        main: VecDeque::new(),
        dropped_at: vec![None; PAGES],
        dropped: 0,
    };
    vec![
        ("fifo", Box::new(Fifo { seen: Seen::new(capacity), queue: VecDeque::new() })),
        ("cache/1", Box::new(Chosen::new(capacity, Some(1)))),
        ("cache", Box::new(Chosen::new(capacity, None))),
        ("cache/64", Box::new(Chosen::new(capacity, Some(64)))),
        ("s3fifo", Box::new(s3fifo)),
        ("opt", Box::new(Opt::new(capacity, trace))),
    ]
}

/// Misses in 100 accesses.
fn misses(policy: &mut dyn Policy, trace: &[u32]) -> f64 {
    let (warm_up, counted) = trace.split_at(WARM_UP);
    for &page in warm_up {
        policy.access(page);
    }
    let missed = counted.iter().filter(|&&page| !policy.access(page)).count();
    100.0 * f64::from(missed as u32) / f64::from(counted.len() as u32)
}

fn main() {
    let traces = traces();
    for percent in [1, 5, 20] {
        let capacity = FILE_PAGES * percent / 100;
        println!("\nThe budget is {capacity} of {FILE_PAGES} pages ({percent} %)");
        for (number, (name, trace)) in traces.iter().enumerate() {
            let mut policies = policies(capacity, trace);
            if number == 0 {
                print!("{:<17}", "misses, %");
                for (name, _) in &policies {
                    print!(" {name:>8}");
                }
                println!();
            }
            print!("{name:<17}");
            for (_, policy) in &mut policies {
                print!(" {:>8.1}", misses(policy.as_mut(), trace));
            }
            println!();
        }
    }
}
