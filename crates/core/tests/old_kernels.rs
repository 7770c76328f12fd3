//! What a window does on kernels without `UFFDIO_MOVE` or `UFFDIO_POISON`.
//! Such answers hold for a whole process, so this test program has one test.

mod common;

use common::{numbered, open, options, remap, shown, LAZY, NOW};
use fremap_core::error::Uninterruptible;
use fremap_core::sys::call::{clear, inject, Call};
use fremap_core::units::{Prot, Selection};
use fremap_core::window::{EngineKind, RemapOptions, Window};
use rustix::io::Errno;

fn exercise(window: &Window, mappings_without_access: u64) {
    remap(window, &(0..64).rev().collect::<Vec<_>>(), 0, NOW);
    assert_eq!(shown(window, 0..64), (1..=64).rev().collect::<Vec<_>>());
    remap(window, &[3, 4, 5], 10, LAZY);
    assert_eq!(shown(window, 10..13), [4, 5, 6]);
    window.protect(&Selection::Range(20, 22), Prot::None, &Uninterruptible).unwrap();
    assert_eq!(window.vma_count().unwrap(), mappings_without_access);
    remap(window, &[50, 51], 20, RemapOptions { prot: Some(Prot::Read), ..NOW });
    assert_eq!(shown(window, 19..23), [45, 51, 52, 42]);
    assert_eq!(window.vma_count().unwrap(), 1);
}

#[test]
fn every_operation_works_without_move_and_without_poison() {
    let store = numbered(64);
    inject(Call::ProbeMove, 0, Errno::INVAL, u32::MAX);
    exercise(&open(&store, &options(EngineKind::Paged)), 1);
    inject(Call::ProbePoison, 0, Errno::INVAL, u32::MAX);
    exercise(&open(&store, &options(EngineKind::Paged)), 3);
    clear();
}
