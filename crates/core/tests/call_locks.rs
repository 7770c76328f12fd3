//! A call that waits for another one's turn can be interrupted, and what only
//! tells the window's state does not wait at all.

mod common;

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{numbered, open, options, shown, ENGINES, NOW};
use fremap_core::error::{Error, Interrupt, Result, Uninterruptible};
use fremap_core::units::{Prot, Selection};
use fremap_core::window::{Target, Window, WindowOptions};

/// Long beyond doubt: reached only by a call that waits for what never comes.
const HANGS: Duration = Duration::from_secs(60);
const PAGES: i64 = 4096;

/// Stops in the middle of a call, and goes on when the other end is dropped.
struct Halt {
    arrived: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Interrupt for Halt {
    fn check(&self) -> Result<()> {
        self.arrived.send(()).ok();
        self.go_on.lock().unwrap().recv().ok();
        Ok(())
    }
}

/// Ctrl-C was pressed already.
struct Stop;

impl Interrupt for Stop {
    fn check(&self) -> Result<()> {
        Err(Error::Interrupted { completed: 0 })
    }
}

fn one() -> Selection {
    Selection::Range(5, 6)
}

fn remap_one(window: &Window) -> Result<()> {
    window.remap(&one(), &Target::From(0), NOW, &Stop).map(|_| ())
}

fn populate_one(window: &Window) -> Result<()> {
    window.populate(&one(), false, &Stop).map(|_| ())
}

fn evict_one(window: &Window) -> Result<()> {
    window.evict(&one(), false, &Stop)
}

fn protect_one(window: &Window) -> Result<()> {
    window.protect(&one(), Prot::None, &Stop)
}

fn place_one(window: &Window) -> Result<()> {
    window.place(&one(), None, &Stop)
}

fn backwards(window: &Window, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
    let pages = Selection::List((0..PAGES).rev().collect());
    window.remap(&pages, &Target::From(0), NOW, interrupt)
}

/// Runs `calls` while another thread is in the middle of a remap.
fn during_a_remap(window: &Arc<Window>, calls: impl FnOnce(&Window) + Send + 'static) {
    let (arrived, here) = channel();
    let (release, go_on) = channel();
    let remapping = Arc::clone(window);
    let halt = Halt { arrived, go_on: Mutex::new(go_on) };
    let remap = std::thread::spawn(move || backwards(&remapping, &halt).map(|_| ()));
    here.recv_timeout(HANGS).expect("a remap asks whether to stop");
    let (done, end) = channel();
    let beside = Arc::clone(window);
    let calls = std::thread::spawn(move || {
        calls(&beside);
        done.send(()).ok();
    });
    // An error also if the calls panicked, which the join tells.
    let ended = end.recv_timeout(HANGS);
    drop(release);
    calls.join().unwrap();
    ended.expect("no call waits for the remap's end");
    remap.join().unwrap().unwrap();
}

#[test]
fn a_call_that_waits_for_its_turn_can_be_interrupted() {
    let store = numbered(PAGES as u64);
    for engine in ENGINES {
        let window = Arc::new(open(&store, &WindowOptions { populate: true, ..options(engine) }));
        during_a_remap(&window, move |window| {
            for call in [remap_one, populate_one, evict_one, protect_one, place_one] {
                let outcome = call(window);
                assert!(matches!(outcome, Err(Error::Interrupted { .. })), "{engine}: {outcome:?}");
            }
        });
        assert_eq!(shown(&window, 4..7), [4092, 4091, 4090], "{engine}");
    }
}

#[test]
fn asking_for_a_windows_state_waits_for_nobodys_turn() {
    let store = numbered(PAGES as u64);
    for engine in ENGINES {
        let window = Arc::new(open(&store, &options(engine)));
        during_a_remap(&window, |window| {
            assert_eq!(
                window.mapping(&Selection::All, &Uninterruptible).unwrap().len(),
                PAGES as usize
            );
            assert_eq!(
                window.protection(&Selection::All, &Uninterruptible).unwrap()[0],
                Prot::Read
            );
            window.present(&Selection::All, &Uninterruptible).unwrap();
            window.stats().unwrap();
        });
        window.remap(&one(), &Target::From(0), NOW, &Uninterruptible).unwrap();
    }
}
