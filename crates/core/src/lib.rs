//! Nonlinear file mappings in user space.
//!
//! A [`window`] is one contiguous range of memory whose pages show any pages of a [`store`], in any
//! order. `docs/architecture.md` shows the layers of the code and the path of a page. Calls go from
//! `window` to `engine` to `sys`, never back.

pub mod cache;
pub mod calibrate;
mod engine;
pub mod error;
mod io;
pub mod memory;
mod plan;
pub mod room;
pub mod rows;
pub mod scatter;
pub mod shared_slots;
pub mod slot_table;
pub mod stats;
pub mod store;
pub mod sys;
mod table;
mod trim;
pub mod units;
pub mod window;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("fremap needs 64-bit Linux");
