//! Nonlinear file mappings in user space.
//!
//! One contiguous [`window`] of memory whose pages show any pages of a
//! [`store`], in any order. `docs/architecture.md` draws the rooms and the way
//! of a page; data flows from `window` to `engine` to `sys`, never back.

pub mod engine;
pub mod error;
pub mod scatter;
pub mod store;
pub mod sys;
pub mod units;
