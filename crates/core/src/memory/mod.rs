//! Memory that this process may have, and who has reserved it.

mod limits;
pub(crate) mod mappings;
mod pool;

pub use limits::available;
pub use pool::{reserve, Ask, GiveBack, Pool, Reservation, LEAST_SHARE};
