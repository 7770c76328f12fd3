//! The memory that this process may use, and its reservations.

mod limits;
pub(crate) mod mappings;
mod pool;

pub use limits::available;
pub use pool::Ask;
pub(crate) use pool::{reserve, GiveBack, Reservation};
