//! One pool of memory for the process: every budget is a reservation from it.
//!
//! A budget in bytes gets these bytes. All "auto" budgets together get at most half of the memory
//! that the process may use. A budget whose owner needs less than its share gets what it needs,
//! permanently. The others share the rest equally: each new one makes their shares smaller, and
//! each one that is dropped makes them larger. Owners whose memory the kernel cannot reclaim are
//! asked at once to give back what exceeds their new share ([`GiveBack`]). The others look at
//! [`Reservation::bytes`] when they take more.
//!
//! A share is never less than [`LEAST_SHARE`], with which every window of pages of up to 512 KiB
//! works.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::limits;
use crate::sys::fork;
use crate::sys::lock::Lock;

/// The least that an "auto" budget comes to.
pub const LEAST_SHARE: u64 = 64 << 20;

/// What is asked of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// So many bytes, whatever there is.
    Bytes(u64),
    /// A share of half of what the process may have; no more than `need`, with which the
    /// owner would have all that it can ever use.
    Auto {
        /// All that the owner can use.
        need: u64,
    },
}

impl Ask {
    /// The same, of an owner that cannot use more than `need`.
    #[must_use]
    pub fn with_need(self, need: u64) -> Self {
        match self {
            Self::Bytes(_) => self,
            Self::Auto { .. } => Self::Auto { need },
        }
    }
}

/// An owner of memory that gives some back.
pub trait GiveBack: Send + Sync {
    /// Gives back what is beyond its reservation, as far as that may be now.
    fn give_back(&self);
}

/// What one reservation has.
struct Account {
    bytes: AtomicU64,
    owner: Lock<Option<Weak<dyn GiveBack>>>,
    /// The process that reserved: children of fork have pools of their own.
    process: u32,
}

impl Account {
    fn new(bytes: u64) -> Arc<Self> {
        let process = crate::sys::process::id();
        Arc::new(Self { bytes: bytes.into(), owner: Lock::new(None), process })
    }
}

#[derive(Default)]
struct Shares {
    /// What all "auto" budgets may come to together.
    total: u64,
    /// Those that have what they need.
    settled: Vec<Arc<Account>>,
    /// Those that share the rest.
    sharing: Vec<Arc<Account>>,
}

impl Shares {
    /// What each of `count` has that share.
    fn share(&self, count: usize) -> u64 {
        let bytes = |account: &Arc<Account>| account.bytes.load(Ordering::Relaxed);
        let settled = self.settled.iter().map(bytes).fold(0, u64::saturating_add);
        (self.total.saturating_sub(settled) / count.max(1) as u64).max(LEAST_SHARE)
    }

    /// Gives each its share; says whose has shrunk.
    fn divide(&self) -> Vec<Arc<Account>> {
        let share = self.share(self.sharing.len());
        let shrunk = |account: &&Arc<Account>| account.bytes.swap(share, Ordering::Relaxed) > share;
        self.sharing.iter().filter(shrunk).map(Arc::clone).collect()
    }

    /// Forgets what a parent of this process has reserved.
    fn forget_parents(&mut self) {
        let process = crate::sys::process::id();
        self.settled.retain(|account| account.process == process);
        self.sharing.retain(|account| account.process == process);
    }
}

/// The memory that budgets are reserved from.
pub struct Pool {
    shares: Lock<Shares>,
    available: fn() -> Result<u64, Errno>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pool").finish_non_exhaustive()
    }
}

static POOL: Pool = Pool::new(limits::available);

/// Reserves from the pool of this process.
pub fn reserve(ask: Ask) -> Result<Reservation, Errno> {
    POOL.reserve(ask)
}

impl Pool {
    const fn new(available: fn() -> Result<u64, Errno>) -> Self {
        let shares = Shares { total: 0, settled: Vec::new(), sharing: Vec::new() };
        Self { shares: Lock::new(shares), available }
    }

    /// Reserves memory until what is returned is dropped. Others may have to give some back.
    pub fn reserve(&'static self, ask: Ask) -> Result<Reservation, Errno> {
        let need = match ask {
            Ask::Bytes(bytes) => {
                return Ok(Reservation { account: Account::new(bytes), pool: None })
            }
            Ask::Auto { need } => need,
        };
        let available = (self.available)()?;
        let no_fork = fork::exclude();
        let mut shares = self.shares.lock();
        shares.forget_parents();
        // What those that are alive have taken is not available now, and stays part of it.
        let alive = !(shares.settled.is_empty() && shares.sharing.is_empty());
        let before = if alive { shares.total.min(available) } else { 0 };
        shares.total = before.max(available / 2);
        let account = Account::new(need);
        if need <= shares.share(shares.sharing.len() + 1) {
            shares.settled.push(Arc::clone(&account));
        } else {
            account.bytes.store(0, Ordering::Relaxed);
            shares.sharing.push(Arc::clone(&account));
        }
        let shrunk = shares.divide();
        drop(shares);
        drop(no_fork);
        for other in shrunk {
            let owner = other.owner.lock().as_ref().and_then(Weak::upgrade);
            if let Some(owner) = owner {
                owner.give_back();
            }
        }
        Ok(Reservation { account, pool: Some(self) })
    }

    fn release(&self, account: &Arc<Account>) {
        let no_fork = fork::exclude();
        let mut shares = self.shares.lock();
        shares.settled.retain(|other| !Arc::ptr_eq(other, account));
        shares.sharing.retain(|other| !Arc::ptr_eq(other, account));
        // Nobody's share shrinks.
        shares.divide();
        drop(shares);
        drop(no_fork);
    }
}

/// Memory that was reserved, until this is dropped.
pub struct Reservation {
    account: Arc<Account>,
    /// Where it is an "auto" budget's.
    pool: Option<&'static Pool>,
}

impl fmt::Debug for Reservation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Reservation").field("bytes", &self.bytes()).finish()
    }
}

impl Reservation {
    /// Bytes that it comes to now; those of a share change as others come and go.
    pub fn bytes(&self) -> u64 {
        self.account.bytes.load(Ordering::Relaxed)
    }

    /// Has `owner` asked to give memory back as soon as its share shrinks.
    pub fn given_back_by(&self, owner: Weak<dyn GiveBack>) {
        *self.account.owner.lock() = Some(owner);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(pool) = self.pool {
            pool.release(&self.account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const ALL: Ask = Ask::Auto { need: u64::MAX };

    fn pool() -> &'static Pool {
        Box::leak(Box::new(Pool::new(|| Ok(16 * GIB))))
    }

    #[test]
    fn eight_that_want_all_share_half() {
        let pool = pool();
        let eight: Vec<_> = (0..8).map(|_| pool.reserve(ALL).expect("memory")).collect();
        assert!(eight.iter().all(|one| one.bytes() == GIB));
        drop(eight);
        assert_eq!(pool.reserve(ALL).expect("memory").bytes(), 8 * GIB);
    }

    #[test]
    fn who_needs_less_than_a_share_has_it_for_good() {
        let pool = pool();
        let small = pool.reserve(Ask::Auto { need: 2 * GIB }).expect("memory");
        let others: Vec<_> = (0..3).map(|_| pool.reserve(ALL).expect("memory")).collect();
        assert_eq!(small.bytes(), 2 * GIB);
        assert!(others.iter().all(|one| one.bytes() == 2 * GIB));
        drop(small);
        assert!(others.iter().all(|one| one.bytes() == 8 * GIB / 3));
    }

    #[test]
    fn bytes_are_had_as_said_and_a_share_is_never_nothing() {
        let pool = pool();
        let said = pool.reserve(Ask::Bytes(100 * GIB)).expect("memory");
        assert_eq!(said.bytes(), 100 * GIB);
        let _all = pool.reserve(Ask::Auto { need: 8 * GIB }).expect("memory");
        assert_eq!(pool.reserve(ALL).expect("memory").bytes(), LEAST_SHARE);
    }

    #[test]
    fn what_the_first_has_taken_already_is_still_part_of_the_half() {
        static LEFT: AtomicU64 = AtomicU64::new(16 * GIB);
        let pool: &'static Pool =
            Box::leak(Box::new(Pool::new(|| Ok(LEFT.load(Ordering::Relaxed)))));
        let first = pool.reserve(ALL).expect("memory");
        LEFT.store(8 * GIB, Ordering::Relaxed);
        let second = pool.reserve(ALL).expect("memory");
        assert_eq!((first.bytes(), second.bytes()), (4 * GIB, 4 * GIB));
        // Somebody else took the rest.
        LEFT.store(2 * GIB, Ordering::Relaxed);
        let _third = pool.reserve(Ask::Auto { need: 1 }).expect("memory");
        assert_eq!(first.bytes() + second.bytes() + 2, 2 * GIB);
    }

    #[test]
    fn an_owner_is_asked_when_its_share_shrinks() {
        #[derive(Default)]
        struct Owner(AtomicU64);
        impl GiveBack for Owner {
            fn give_back(&self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let pool = pool();
        let owner = Arc::new(Owner::default());
        let first = pool.reserve(ALL).expect("memory");
        let weak: Weak<Owner> = Arc::downgrade(&owner);
        first.given_back_by(weak);
        let second = pool.reserve(ALL).expect("memory");
        assert_eq!(owner.0.load(Ordering::Relaxed), 1);
        drop(second);
        assert_eq!((first.bytes(), owner.0.load(Ordering::Relaxed)), (8 * GIB, 1));
    }
}
