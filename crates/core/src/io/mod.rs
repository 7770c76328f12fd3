//! Moves segments (bytes of a file, and memory) between files and memory, many in flight
//! together.
//!
//! Pages, rows and write-back each say what is to be moved and what became of it
//! ([`Transfer`]). Everything between is here, once:
//!
//! - [`Segment`]s that are neighbours in a file become one request ([`join`]);
//! - the requests are in flight together, as many as the process may have ([`Quota`]), by a ring,
//!   by threads or by the caller ([`Way`], [`transfer`]);
//! - a request that moved fewer bytes than it was to goes on from there, and one that the kernel
//!   put off (EINTR, EAGAIN) is made again;
//! - a wait ends now and then, so that the caller can interrupt ([`Pace`]);
//! - what a request could not read is read alone, and what came of a file that was cut or changed
//!   meanwhile is known ([`read_alone`], [`is_unchanged`]).
//!
//! The kernel moves the bytes of a request until it ends, so [`transfer`] never returns before
//! all that it began has.

mod alone;
mod pace;
mod quota;
mod segment;
mod transfer;

pub(crate) use alone::{is_unchanged, read_alone};
pub(crate) use pace::Pace;
pub(crate) use quota::{Quota, Share};
pub(crate) use segment::{join, Segment, MAX_REQUEST_BYTES};
pub(crate) use transfer::{transfer, Ended, Request, Transfer, Way};

/// Bytes in flight from which on no direct request is begun: an interrupt waits for them.
pub(crate) const MAX_FLIGHT_BYTES: usize = 8 << 20;
