//! Taking pages out of a window whose stores the kernel only notes.
//!
//! Nothing there keeps a thread from storing to a page between the question what was
//! stored and the dropping of the page. So pages are *moved* out, to memory that
//! nobody else knows: what they hold then is what they held last. Dirty ones are written
//! from there. A page that was clean when the kernel was asked can have been stored to
//! before it was moved; that shows, as it differs from a copy made before the question.

use rustix::io::Errno;

use super::frames::Frames;
use super::save::Writing;
use super::{offset_of, Shared, State};
use crate::error::{Error, Result, Uninterruptible};
use crate::plan;
use crate::store::Outgoing;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::sys::tell::tell;
use crate::units::{PageSize, Run, WindowPage};

/// Bytes of pages that are taken out together, unless a page is larger: they and their
/// copies stay in the processor's cache until they are compared.
pub(super) const LIMBO_BYTES: usize = 128 << 10;

/// Memory that pages are moved out to, and copies of them. Empty between two uses.
#[derive(Debug)]
pub struct Limbo {
    region: Region,
    copies: Vec<u8>,
    page: PageSize,
}

/// A page that is taken out, its place in limbo, and whether it has to be written.
#[derive(Clone, Copy, Debug)]
struct Taken {
    page: Writing,
    slot: usize,
    dirty: bool,
}

impl Limbo {
    /// Limbo for the pages of `frames`.
    ///
    /// # Errors
    /// ENOMEM; the kernel's.
    pub fn new<F: Frames>(frames: &F, page: PageSize) -> Result<Self, Errno> {
        let bytes = LIMBO_BYTES.max(page.bytes());
        let mut region = Region::anonymous(bytes, system_page_bytes(), Access::Write)?;
        frames.adopt_limbo(&mut region)?;
        Ok(Self { region, copies: vec![0; bytes], page })
    }

    /// Pages that can be taken out together.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.region.len() / self.page.bytes()
    }

    fn content(&self, slot: usize) -> Span<'_> {
        self.region.span(slot * self.page.bytes(), self.page.bytes())
    }

    fn copy(&mut self, slot: usize) -> &mut [u8] {
        let page_bytes = self.page.bytes();
        &mut self.copies[slot * page_bytes..][..page_bytes]
    }
}

impl<F: Frames> Shared<F> {
    /// Takes pages out of the window and writes what was stored to them. `pages` are
    /// sorted, present, show file pages, are held, and no more than limbo has room for.
    /// Afterwards they are absent and held; if writing fails, the dirty ones are back.
    /// Limbo must not be used again if it could not be emptied, which is the inner error.
    ///
    /// # Errors
    /// I/O; the kernel's.
    pub(super) fn take_out(
        &self,
        operation: &'static str,
        limbo: &mut Limbo,
        pages: &[WindowPage],
    ) -> Result<Result<(), Errno>> {
        for (slot, &page) in pages.iter().enumerate() {
            self.content_of(page).copy_to(limbo.copy(slot));
        }
        let moved = self.move_to_limbo(limbo, pages);
        let outcome = moved.map_err(|errno| Error::system(operation, errno)).and_then(|taken| {
            let written = self.write_taken(limbo, &taken);
            if written.is_err() {
                self.bring_back(limbo, taken.iter().filter(|taken| taken.dirty));
            }
            written.map_err(|error| error.with_operation(operation))
        });
        let emptied = limbo.region.advise(0, limbo.region.len(), self.frames.dont_need());
        outcome.map(|()| emptied)
    }

    fn move_to_limbo(&self, limbo: &mut Limbo, pages: &[WindowPage]) -> Result<Vec<Taken>, Errno> {
        let page_size = self.store.page_size();
        let mut state = self.state.lock();
        self.note_stores(&mut state, pages, false)?;
        let mut slot = 0;
        for run in plan::runs(pages.iter().copied()) {
            let (offset, len) = self.bytes(run);
            let to = limbo.region.span(slot * page_size.bytes(), len);
            if let Err(errno) = self.frames.move_out(offset, to) {
                // What came out before goes back where it was, and is taken for dirty.
                let all = self.taken(&state, pages, |_, _| true);
                drop(state);
                self.bring_back(limbo, all.iter());
                return Err(errno);
            }
            slot += run.count as usize;
        }
        let taken = self.taken(&state, pages, |slot, dirty| {
            let copy = &limbo.copies[slot * page_size.bytes()..][..page_size.bytes()];
            dirty || !limbo.content(slot).holds(copy)
        });
        for &page in pages {
            let entry = state.get(page).with_present(false).with_held(true);
            state.mark(page, entry);
        }
        Ok(taken)
    }

    /// Pages with their places; `is_dirty` is told the place and what the table says.
    fn taken(
        &self,
        state: &State,
        pages: &[WindowPage],
        mut is_dirty: impl FnMut(usize, bool) -> bool,
    ) -> Vec<Taken> {
        let place = |(slot, &window_page): (usize, &WindowPage)| {
            let page = self.writing(state, window_page)?;
            let dirty = is_dirty(slot, state.get(window_page).dirty());
            Some(Taken { page, slot, dirty })
        };
        pages.iter().enumerate().filter_map(place).collect()
    }

    fn write_taken(&self, limbo: &Limbo, taken: &[Taken]) -> Result<()> {
        let mut dirty: Vec<&Taken> = taken.iter().filter(|taken| taken.dirty).collect();
        if dirty.is_empty() {
            return Ok(());
        }
        dirty.sort_unstable_by_key(|taken| taken.page.file_page);
        let outgoing = |taken: &&Taken| taken.page.outgoing(limbo.content(taken.slot));
        let outgoing: Vec<Outgoing<'_>> = dirty.iter().map(outgoing).collect();
        self.state.lock().unsynced = true;
        self.store.write_from(&outgoing, &Uninterruptible)
    }

    /// Puts pages back into the window, dirty, and lets go of them.
    fn bring_back<'t>(&self, limbo: &Limbo, taken: impl Iterator<Item = &'t Taken>) {
        for taken in taken {
            let window_page = taken.page.window_page;
            let offset = offset_of(self.store.page_size(), window_page);
            let mut state = self.state.lock();
            match self.frames.move_back(offset, limbo.content(taken.slot)) {
                Ok(()) => {
                    let entry = state.get(window_page).with_present(true).with_dirty(true);
                    state.mark(window_page, entry);
                }
                Err(errno) => {
                    drop(state);
                    tell(format_args!(
                        "window page {}: what was stored to it is lost, as it could neither be \
                         written nor put back ({errno})",
                        window_page.0
                    ));
                }
            }
        }
    }

    pub(super) fn bytes(&self, run: Run<WindowPage>) -> (usize, usize) {
        let page_size = self.store.page_size();
        (offset_of(page_size, run.first), offset_of(page_size, WindowPage(run.count)))
    }

    pub(super) fn content_of(&self, page: WindowPage) -> Span<'_> {
        let page_size = self.store.page_size();
        self.frames.region().span(offset_of(page_size, page), page_size.bytes())
    }
}
