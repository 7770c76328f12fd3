//! What the tests of windows share.
#![allow(dead_code)] // each test program uses a part

use std::cell::Cell;
use std::sync::Arc;

use fremap_core::calibrate::Calibration;
use fremap_core::error::{Error, Interrupt, Result, Uninterruptible};
use fremap_core::store::Store;
use fremap_core::sys::span::Span;
use fremap_core::units::{FilePage, Pages, Prot, Selection};
use fremap_core::window::{
    Budget, EngineKind, FaultMode, Mapping, RemapOptions, Target, Window, WindowOptions,
};

pub const PAGE: usize = 4096;
pub const ENGINES: [EngineKind; 3] = [EngineKind::Alias, EngineKind::Paged, EngineKind::Eager];
pub const NOW: RemapOptions =
    RemapOptions { prot: None, nonblock: false, populate: true, discard: false, in_place: false };
pub const LAZY: RemapOptions = RemapOptions { populate: false, ..NOW };

/// A store whose page i is filled with the word i + 1.
pub fn numbered(page_count: u64) -> Arc<Store> {
    let store = Store::memory(page_count * PAGE as u64, None).unwrap();
    for page in 0..page_count {
        let mut content = (page + 1).to_le_bytes().repeat(PAGE / 8);
        store
            .write(&Pages::List(vec![FilePage(page)]), Span::of(&mut content), &Uninterruptible)
            .unwrap();
    }
    Arc::new(store)
}

pub fn options(engine: EngineKind) -> WindowOptions {
    WindowOptions {
        page_count: None,
        first_page: 0,
        mapping: Mapping::Linear,
        prot: Prot::Read,
        coherent: None,
        engine: Some(engine),
        populate: engine == EngineKind::Eager,
        nonblock: false,
        lock: false,
        tracking: None,
        fault: FaultMode::Thread,
        budget: Budget::Unlimited,
        calibration: Calibration::default(),
    }
}

pub fn open(store: &Arc<Store>, options: &WindowOptions) -> Window {
    Window::new(Arc::clone(store), options, &Uninterruptible).unwrap()
}

/// The number that a whole page holds.
pub fn number(window: &Window, page: usize) -> u64 {
    let bytes = window.memory().part(page * PAGE, PAGE).to_vec();
    let (word, _) = bytes.split_first_chunk().unwrap();
    assert!(bytes == word.repeat(PAGE / word.len()), "page {page} is a mixture");
    u64::from_le_bytes(*word)
}

pub fn remap(window: &Window, pages: &[i64], at: i64, options: RemapOptions) -> Vec<bool> {
    window
        .remap(&Selection::List(pages.to_vec()), &Target::From(at), options, &Uninterruptible)
        .unwrap()
}

pub fn shown(window: &Window, pages: std::ops::Range<usize>) -> Vec<u64> {
    pages.map(|page| number(window, page)).collect()
}

/// Stops a call at the n-th question.
pub struct StopAt {
    pub asked: Cell<usize>,
    pub at: usize,
}

impl Interrupt for StopAt {
    fn check(&self) -> Result<()> {
        self.asked.set(self.asked.get() + 1);
        if self.asked.get() >= self.at {
            return Err(Error::Interrupted { completed: 0 });
        }
        Ok(())
    }
}
