//! What a window shows at first.

use super::{Mapping, WindowOptions};
use crate::engine::EngineKind;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::table::{Entry, Origin, Shown, Table};
use crate::units::{FilePage, PageIndex, Prot, WindowPage};

/// The table of a window that is to be made.
pub(super) fn first_table(
    store: &Store,
    options: &WindowOptions,
    kind: EngineKind,
) -> Result<Table> {
    let file_pages = store.page_count();
    if file_pages > Entry::MAX_FILE_PAGES {
        return Err(Error::Argument(format!(
            "Window: the store has {file_pages} pages, and a window can show at most {}; use a \
             larger page_bytes",
            Entry::MAX_FILE_PAGES
        )));
    }
    let range = |index| Error::PageRange {
        operation: "Window",
        coordinate: "first_page",
        index,
        least: 0,
        limit: file_pages,
    };
    let first = u64::try_from(options.first_page).map_err(|_| range(options.first_page))?;
    if first > file_pages {
        return Err(range(options.first_page));
    }
    let page_count = match (options.page_count, &options.mapping) {
        (Some(count), _) => count,
        (None, Mapping::List(list)) => list.len() as u64,
        (None, _) => file_pages - first,
    };
    if page_count == 0 {
        return Err(Error::Argument(
            "Window: the window would have no page; it needs at least one".to_owned(),
        ));
    }
    let most = i64::MAX.unsigned_abs() / 2 / store.page_size().bytes() as u64;
    if page_count > most {
        return Err(Error::Argument(format!(
            "Window: {page_count} pages do not fit into the address space, which has {most}; use \
             fewer pages"
        )));
    }
    let once = options.prot == Prot::Write && kind != EngineKind::Alias;
    if once && page_count > Table::MAX_PAGES_WITH_APPEARANCES {
        return Err(Error::Argument(format!(
            "Window: {page_count} pages are too many for a writable window that is not coherent, \
             which has at most {}; use fewer pages or a larger page_bytes",
            Table::MAX_PAGES_WITH_APPEARANCES
        )));
    }
    let new = |origin| {
        let table = Table::new(page_count, origin, options.prot)?;
        if once {
            table.with_appearances()
        } else {
            Ok(table)
        }
    };
    match &options.mapping {
        Mapping::Linear if page_count > file_pages - first => Err(Error::Argument(format!(
            "Window: {page_count} pages from file page {first} end beyond the store, which has \
             {file_pages}; use fewer pages, or mapping=\"none\" and remap"
        ))),
        Mapping::Linear => new(Origin::Linear(FilePage(first))),
        Mapping::None => new(Origin::Nothing),
        Mapping::List(list) => listed_table(list, new(Origin::Nothing)?, file_pages, options.prot),
    }
}

/// Has `table`, which shows nothing yet, show the pages of `list`.
fn listed_table(list: &[i64], mut table: Table, file_pages: u64, prot: Prot) -> Result<Table> {
    let page_count = table.page_count();
    if list.len() as u64 != page_count {
        return Err(Error::Argument(format!(
            "Window: the mapping has {} pages and page_count is {page_count}",
            list.len()
        )));
    }
    table.reserve_moves("Window", (0..page_count).map(WindowPage))?;
    for (&index, page) in list.iter().zip(0..) {
        match u64::try_from(index) {
            Ok(file_page) if file_page < file_pages => {
                if let Some(other) = table.appearances(FilePage(file_page)).next() {
                    return Err(Error::Alias {
                        operation: "Window",
                        file_page,
                        window_page: other.0,
                        other_page: page,
                    });
                }
                table.set(WindowPage(page), Entry::new(Shown::File(FilePage(file_page)), prot));
            }
            Err(_) if index == -1 => {}
            _ => {
                return Err(Error::PageRange {
                    operation: "Window",
                    coordinate: FilePage::COORDINATE,
                    index,
                    least: -1,
                    limit: file_pages,
                })
            }
        }
    }
    Ok(table)
}
