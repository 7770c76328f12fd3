use super::*;
use crate::table::{Origin, Table};
use crate::units::WindowPage;

#[test]
fn the_largest_file_page_is_neither_nothing_nor_placed() {
    let last = FilePage(Entry::MAX_FILE_PAGES - 1);
    let entry = Entry::new(Shown::File(last), Prot::Write);
    assert_eq!(entry.shown(), Shown::File(last));
    assert_eq!(entry.prot(), Prot::Write);
    assert!(entry.residency() == Residency::Absent && entry.clean());
}

/// Every word that a table may hold for a page of a file.
fn words() -> Vec<Entry> {
    use Residency::{Absent, Denied, Present, Stale, Unreadable};
    let mut words = Vec::new();
    for residency in [Absent, Present, Denied, Unreadable, Stale] {
        for change in [Change::Clean, Change::Dirty, Change::Writing, Change::Rewritten] {
            for prot in [Prot::None, Prot::Read, Prot::Write] {
                for (held, pinned) in [(false, false), (true, false), (false, true), (true, true)] {
                    let word = Entry::new(Shown::File(FilePage(7)), prot).with_pinned(pinned);
                    let word = word.with_residency(residency).with_change(change);
                    words.push(if held { word.hold() } else { word });
                }
            }
        }
    }
    words.retain(|word| allowed(*word));
    words
}

fn allowed(word: Entry) -> bool {
    let open = word.prot() != Prot::None;
    (open || !word.present())
        && (!open || word.residency() != Residency::Denied)
        && (word.clean() || word.present())
}

/// What a transition makes of a word, None where it refuses it.
fn after(
    word: Entry,
    transition: impl Fn(Entry) -> Entry + std::panic::UnwindSafe,
) -> Option<Entry> {
    std::panic::catch_unwind(move || transition(word)).ok()
}

#[test]
fn a_word_says_what_was_put_into_it() {
    let words = words();
    assert_eq!(words.len(), 4 * (2 * 4 + 3 + 1 + 3 + 3));
    let mut distinct: Vec<u64> = words.iter().map(|word| word.0).collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), words.len());
    for word in words {
        assert_eq!(word.shown(), Shown::File(FilePage(7)));
        let parts = word.with_residency(word.residency()).with_change(word.change());
        assert_eq!(parts.with_prot(word.prot()).with_pinned(word.pinned()), word);
        let mut table = Table::new(1, Origin::Nothing, Prot::Read).unwrap();
        table.set(WindowPage(0), word);
        assert_eq!(table.get(WindowPage(0)), word);
    }
}

#[test]
fn residency_changes_only_as_drawn() {
    use Residency::{Absent, Denied, Present, Stale, Unreadable};
    type Transition = fn(Entry) -> Entry;
    let transitions: [(Transition, &[Residency], Residency); 5] = [
        (Entry::finish_load, &[Absent, Denied, Unreadable, Stale], Present),
        (Entry::fail_load, &[Absent, Denied, Unreadable, Stale], Unreadable),
        (Entry::load_in_part, &[Absent, Denied, Unreadable, Stale], Stale),
        (Entry::begin_drop, &[Present, Stale], Stale),
        (Entry::finish_drop, &[Absent, Present, Denied, Unreadable, Stale], Absent),
    ];
    for word in words() {
        for (transition, from, to) in transitions {
            let found = after(word, transition);
            assert_eq!(found.is_some(), from.contains(&word.residency()), "{word:?}");
            let Some(found) = found else { continue };
            assert_eq!(found.residency(), to);
            assert!(found.clean() && found.held() == word.held(), "{word:?} -> {found:?}");
            assert_eq!((found.shown(), found.prot()), (word.shown(), word.prot()));
            assert_eq!(found.pinned(), word.pinned());
        }
        let denied = word.deny();
        assert_eq!(denied.prot(), Prot::None);
        assert_eq!(denied.residency(), if word.present() { Denied } else { Absent });
        assert!(allowed(denied) && denied.held() == word.held());
        let open = after(word, |word| word.allow(Prot::Write));
        assert_eq!(open.is_some(), word.prot() == Prot::None);
        if let Some(open) = open {
            assert_eq!((open.residency(), open.prot()), (Absent, Prot::Write));
        }
        let forgotten = if word.residency() == Denied { word.finish_drop() } else { word };
        assert_eq!(word.forget_denied().residency(), forgotten.residency());
        assert_eq!(word.forget_denied().held(), word.held());
    }
}

#[test]
fn a_change_is_written_back_as_drawn() {
    use Change::{Clean, Dirty, Rewritten, Writing};
    for word in words() {
        let noted = after(word, Entry::note_write);
        assert_eq!(noted.is_some(), word.present());
        if let Some(noted) = noted {
            let expected = if word.writing() { Rewritten } else { Dirty };
            assert_eq!((noted.change(), noted.held()), (expected, word.held()));
        }
        let begun = after(word, Entry::begin_writeback);
        assert_eq!(begun.map(Entry::change), (word.change() == Dirty).then_some(Writing));
        for saved in [true, false] {
            let ended = after(word, |word| word.finish_writeback(saved)).map(Entry::change);
            let expected = match word.change() {
                Clean | Dirty => None,
                Writing if saved => Some(Clean),
                Writing | Rewritten => Some(Dirty),
            };
            assert_eq!(ended, expected, "{word:?}");
        }
        let undone = after(word, Entry::unnote_write).map(Entry::change);
        assert_eq!(undone, (!word.writing()).then_some(Clean));
    }
}

#[test]
fn held_and_pinned_change_nothing_else() {
    for word in words() {
        assert!(word.hold().held() && !word.released().held());
        assert_eq!(word.hold().released(), word.released());
        assert!(word.with_pinned(true).pinned());
        assert_eq!(word.hold().residency(), word.residency());
        assert_eq!(word.with_pinned(true).change(), word.change());
    }
}
