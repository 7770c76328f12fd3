//! The word of one window page: its states, and the transitions between them.

use crate::units::{FilePage, Prot};

/// What a window page shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A page of the store.
    File(FilePage),
    /// Nothing: a touch is SIGBUS or SIGSEGV.
    Nothing,
    /// Content of its own, with no file behind it.
    Placed,
}

impl Shown {
    /// The file page, if it is one.
    pub fn file_page(self) -> Option<FilePage> {
        match self {
            Self::File(page) => Some(page),
            Self::Nothing | Self::Placed => None,
        }
    }

    /// As users see it: the file page, -1 for nothing, -2 for a placed page.
    pub fn number(self) -> i64 {
        match self {
            Self::File(page) => page.0.cast_signed(),
            Self::Nothing => -1,
            Self::Placed => -2,
        }
    }
}

/// Where the content of a page is.
///
/// ```text
///                   finish_load             begin_drop
///        Absent ------------------> Present ----------> Stale
///        |    ^                        |                 |
///  fail_ |    | allow                  | deny            |
///   load |    +------------ Denied <---+                 |
///        v    |                                          |
///   Unreadable|             finish_drop                  |
///        +----+------------------------------------------+
/// ```
///
/// `finish_drop` leads to `Absent` from every state. A load that is under way is no state:
/// the page is absent until it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Residency {
    /// Not in the window: a touch is a fault.
    Absent,
    /// In the window: a touch is no fault.
    Present,
    /// It was present when access was taken away; giving access back brings it back.
    Denied,
    /// Reading it failed: a touch is SIGBUS until the page is populated or evicted.
    Unreadable,
    /// Absent, but the kernel may still have what was there: a call that was to drop it is
    /// under way or has failed, and the next one drops it.
    Stale,
}

/// Whether the store has the content of a present page.
///
/// ```text
///            note_write         begin_writeback            note_write
///    Clean ------------> Dirty -----------------> Writing ------------> Rewritten
///      ^                  ^ ^                      |   |                    |
///      |                  | +----------------------+   |                    |
///      |                  |  finish_writeback(false)   |                    |
///      |                  +----------------------------|--------------------+
///      |                      finish_writeback         |
///      +-----------------------------------------------+
///                         finish_writeback(true)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Change {
    /// It has.
    Clean,
    /// It was written to since it was loaded or last written back.
    Dirty,
    /// It is being written back.
    Writing,
    /// It is being written back, and was written to since that began.
    Rewritten,
}

/// The word of one window page: what it shows, how it may be accessed, its state.
///
/// Invariants, which [`Table::set`] checks: a page without access ([`Prot::None`]) is not
/// present, a denied page has no access, and only a present page is other than clean.
#[derive(Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Entry(u64);

impl Entry {
    const FILE_PAGE: u64 = (1 << 40) - 1;
    const NOTHING: u64 = Self::FILE_PAGE;
    const PLACED: u64 = Self::FILE_PAGE - 1;
    /// Store pages that a table can name.
    pub const MAX_FILE_PAGES: u64 = Self::PLACED;

    const RESIDENCY_SHIFT: u32 = 40;
    const RESIDENCY: u64 = 7 << Self::RESIDENCY_SHIFT;
    const CHANGE_SHIFT: u32 = 43;
    const CHANGE: u64 = 3 << Self::CHANGE_SHIFT;
    const PROT_SHIFT: u32 = 45;
    const PROT: u64 = 3 << Self::PROT_SHIFT;
    const HELD: u64 = 1 << 47;
    const PINNED: u64 = 1 << 48;

    /// A page that shows `shown`, absent.
    pub fn new(shown: Shown, prot: Prot) -> Self {
        let page = match shown {
            Shown::File(page) => {
                assert!(page.0 < Self::MAX_FILE_PAGES, "a file page that fits a word");
                page.0
            }
            Shown::Nothing => Self::NOTHING,
            Shown::Placed => Self::PLACED,
        };
        Self(page).with_prot(prot)
    }

    /// The word itself.
    pub(super) fn word(self) -> u64 {
        self.0
    }

    /// The page of a [`word`](Self::word).
    pub(super) fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// What it shows.
    pub fn shown(self) -> Shown {
        match self.0 & Self::FILE_PAGE {
            Self::NOTHING => Shown::Nothing,
            Self::PLACED => Shown::Placed,
            page => Shown::File(FilePage(page)),
        }
    }

    /// What may be done with it.
    pub fn prot(self) -> Prot {
        match (self.0 & Self::PROT) >> Self::PROT_SHIFT {
            0 => Prot::None,
            1 => Prot::Read,
            _ => Prot::Write,
        }
    }

    /// Where its content is.
    pub fn residency(self) -> Residency {
        match (self.0 & Self::RESIDENCY) >> Self::RESIDENCY_SHIFT {
            0 => Residency::Absent,
            1 => Residency::Present,
            2 => Residency::Denied,
            3 => Residency::Unreadable,
            _ => Residency::Stale,
        }
    }

    /// Whether the store has its content.
    pub fn change(self) -> Change {
        match (self.0 & Self::CHANGE) >> Self::CHANGE_SHIFT {
            0 => Change::Clean,
            1 => Change::Dirty,
            2 => Change::Writing,
            _ => Change::Rewritten,
        }
    }

    /// Whether its content is in the window: a touch does not fault.
    pub fn present(self) -> bool {
        self.residency() == Residency::Present
    }

    /// Whether reading it failed.
    pub fn unreadable(self) -> bool {
        self.residency() == Residency::Unreadable
    }

    /// Whether the kernel may have content for it that the table calls absent.
    pub fn stale(self) -> bool {
        self.residency() == Residency::Stale
    }

    /// Whether the kernel has, or may have, content for it.
    pub fn occupied(self) -> bool {
        self.present() || self.stale()
    }

    /// Whether it was written to since it was loaded or its last write-back began.
    pub fn dirty(self) -> bool {
        matches!(self.change(), Change::Dirty | Change::Rewritten)
    }

    /// Whether it is being written back.
    pub fn writing(self) -> bool {
        matches!(self.change(), Change::Writing | Change::Rewritten)
    }

    /// Whether the store has all of its content.
    pub fn clean(self) -> bool {
        self.change() == Change::Clean
    }

    /// Whether a call is about to change it: a thread that writes to it waits.
    pub fn held(self) -> bool {
        self.0 & Self::HELD != 0
    }

    /// Whether it may not be evicted.
    pub fn pinned(self) -> bool {
        self.0 & Self::PINNED != 0
    }

    /// Whether a touch may bring its content: it is absent and may be accessed.
    pub fn loadable(self) -> bool {
        let absent = matches!(self.residency(), Residency::Absent | Residency::Stale);
        absent && self.prot() != Prot::None
    }

    /// The same page showing something else, in the same state.
    pub fn with_shown(self, shown: Shown) -> Self {
        Self(self.0 & !Self::FILE_PAGE | Self::new(shown, Prot::None).0)
    }

    /// The same page with other protection.
    pub fn with_prot(self, prot: Prot) -> Self {
        let bits = match prot {
            Prot::None => 0,
            Prot::Read => 1,
            Prot::Write => 2,
        };
        Self(self.0 & !Self::PROT | bits << Self::PROT_SHIFT)
    }

    fn with_residency(self, residency: Residency) -> Self {
        Self(self.0 & !Self::RESIDENCY | (residency as u64) << Self::RESIDENCY_SHIFT)
    }

    fn with_change(self, change: Change) -> Self {
        Self(self.0 & !Self::CHANGE | (change as u64) << Self::CHANGE_SHIFT)
    }

    /// In another residency, where nothing is known to be changed. A hold lasts: it is ended by
    /// who has it.
    fn becomes(self, residency: Residency) -> Self {
        self.with_residency(residency).with_change(Change::Clean)
    }

    /// Its content is in the window now.
    pub fn finish_load(self) -> Self {
        assert!(!self.present(), "{self:?} is loaded");
        self.becomes(Residency::Present)
    }

    /// Its content could not be read.
    pub fn fail_load(self) -> Self {
        assert!(!self.present(), "{self:?} is loaded");
        self.becomes(Residency::Unreadable)
    }

    /// The kernel is about to be asked to drop its content.
    pub fn begin_drop(self) -> Self {
        assert!(self.occupied(), "{self:?} has nothing to drop");
        self.becomes(Residency::Stale)
    }

    /// The kernel may have got a part of its content.
    pub fn load_in_part(self) -> Self {
        assert!(!self.present(), "{self:?} is loaded");
        self.becomes(Residency::Stale)
    }

    /// The kernel has nothing for it.
    pub fn finish_drop(self) -> Self {
        self.becomes(Residency::Absent)
    }

    /// Access is taken from it, and what it showed is not in the window any more.
    pub fn deny(self) -> Self {
        let denied = if self.present() { Residency::Denied } else { Residency::Absent };
        self.becomes(denied).with_prot(Prot::None)
    }

    /// Access is given to it; it is absent still.
    pub fn allow(self, prot: Prot) -> Self {
        assert!(self.prot() == Prot::None, "{self:?} has access");
        self.becomes(Residency::Absent).with_prot(prot)
    }

    /// What was denied is not to come back with access.
    pub fn forget_denied(self) -> Self {
        if self.residency() == Residency::Denied {
            self.with_residency(Residency::Absent)
        } else {
            self
        }
    }

    /// It was written to.
    pub fn note_write(self) -> Self {
        assert!(self.present(), "{self:?} is not in the window");
        match self.change() {
            Change::Clean | Change::Dirty => self.with_change(Change::Dirty),
            Change::Writing | Change::Rewritten => self.with_change(Change::Rewritten),
        }
    }

    /// What was thought to be a write was none.
    pub fn unnote_write(self) -> Self {
        assert!(!self.writing(), "{self:?} is being written back");
        self.with_change(Change::Clean)
    }

    /// It is being written back from now on.
    pub fn begin_writeback(self) -> Self {
        assert!(self.change() == Change::Dirty, "{self:?} is not to be written back");
        self.with_change(Change::Writing)
    }

    /// Its write-back is over; `saved`: the store has what it held when that began.
    pub fn finish_writeback(self, saved: bool) -> Self {
        assert!(self.writing(), "{self:?} is not being written back");
        let clean = saved && self.change() == Change::Writing;
        self.with_change(if clean { Change::Clean } else { Change::Dirty })
    }

    /// A call is about to change it.
    pub fn hold(self) -> Self {
        Self(self.0 | Self::HELD)
    }

    /// The call is over.
    pub fn released(self) -> Self {
        Self(self.0 & !Self::HELD)
    }

    /// The same page, pinned or not.
    pub fn with_pinned(self, pinned: bool) -> Self {
        Self(if pinned { self.0 | Self::PINNED } else { self.0 & !Self::PINNED })
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Entry")
            .field("shown", &self.shown())
            .field("prot", &self.prot())
            .field("residency", &self.residency())
            .field("change", &self.change())
            .field("held", &self.held())
            .field("pinned", &self.pinned())
            .finish()
    }
}

#[cfg(test)]
mod tests;
