//! The words of the table, and what they say.

use super::layout::KEY_BITS;
use crate::slot_table::Key;

/// The number of a process that uses the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerIndex(pub usize);

/// What a slot's word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Empty,
    /// A process reads this extent.
    Coming(Key, OwnerIndex),
    /// A process writes this extent, to the store and then to the slot.
    Writing(Key, OwnerIndex),
    Here(Key),
}

const COMING: u64 = 1;
const HERE: u64 = 2;
const WRITING: u64 = 3;
const STATE_SHIFT: u32 = 62;
const KEY_MASK: u64 = (1 << KEY_BITS) - 1;

impl Content {
    pub fn of(word: u64) -> Self {
        let key = Key(word & KEY_MASK);
        let owner = OwnerIndex((word >> KEY_BITS) as usize & ((1 << (STATE_SHIFT - KEY_BITS)) - 1));
        match word >> STATE_SHIFT {
            COMING => Self::Coming(key, owner),
            WRITING => Self::Writing(key, owner),
            HERE => Self::Here(key),
            _ => Self::Empty,
        }
    }

    pub fn word(self) -> u64 {
        let brought = |state, key: Key, owner: OwnerIndex| {
            state << STATE_SHIFT | (owner.0 as u64) << KEY_BITS | key.0
        };
        match self {
            Self::Empty => 0,
            Self::Coming(key, owner) => brought(COMING, key, owner),
            Self::Writing(key, owner) => brought(WRITING, key, owner),
            Self::Here(key) => HERE << STATE_SHIFT | key.0,
        }
    }

    pub fn key(self) -> Option<Key> {
        match self {
            Self::Empty => None,
            Self::Coming(key, _) | Self::Writing(key, _) | Self::Here(key) => Some(key),
        }
    }

    /// The process that reads or writes it.
    pub fn bringer(self) -> Option<OwnerIndex> {
        match self {
            Self::Empty | Self::Here(_) => None,
            Self::Coming(_, owner) | Self::Writing(_, owner) => Some(owner),
        }
    }
}

/// Holds on a slot: of one process, or of all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holds {
    /// Calls under way that name the slot's extent.
    pub users: u32,
    /// Pins, which outlast the call that made them.
    pub pins: u32,
}

impl Holds {
    pub fn of(word: u64) -> Self {
        Self { users: word as u32, pins: (word >> 32) as u32 }
    }

    pub fn word(self) -> u64 {
        u64::from(self.pins) << 32 | u64::from(self.users)
    }

    pub fn plus(self, other: Self) -> Self {
        Self {
            users: self.users.saturating_add(other.users),
            pins: self.pins.saturating_add(other.pins),
        }
    }

    pub fn minus(self, other: Self) -> Self {
        Self {
            users: self.users.saturating_sub(other.users),
            pins: self.pins.saturating_sub(other.pins),
        }
    }
}

/// A call that names a slot's extent.
pub const USER: Holds = Holds { users: 1, pins: 0 };
/// A pin.
pub const PIN: Holds = Holds { users: 0, pins: 1 };

/// A slot's link: the next one in its bucket or in the list of free slots (from 1; 0 for none),
/// and how often its extent was named lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub next: u32,
    pub uses: u32,
}

impl Link {
    pub fn of(word: u64) -> Self {
        Self { next: word as u32, uses: (word >> 32) as u32 }
    }

    pub fn word(self) -> u64 {
        u64::from(self.uses) << 32 | u64::from(self.next)
    }
}
