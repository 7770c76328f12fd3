//! Transfers *segments* (bytes of a file and their place in memory) between files and memory, with
//! many requests in flight.
//!
//! Pages, rows and write-back each say which segments to transfer, and what to do with the results
//! ([`Transfer`]). Everything in between is here, once:
//!
//! - neighbouring [`Segment`]s of a file become one request ([`join`]);
//! - requests are in flight together, as many as the process may have ([`Quota`]), by a ring, by
//!   threads or by the caller ([`Way`], [`transfer`]);
//! - a request that transferred too few bytes continues from there, and one that the kernel put off
//!   (EINTR, EAGAIN) is repeated;
//! - a wait is divided into short ones, so that the caller can interrupt ([`Pace`]);
//! - bytes that a request could not read are read alone, and a file that was truncated or changed
//!   meanwhile is detected ([`read_alone`], [`is_unchanged`]).
//!
//! The kernel uses the memory of a request until the request ends. So [`transfer`] does not return
//! before all requests that it started have ended.

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
