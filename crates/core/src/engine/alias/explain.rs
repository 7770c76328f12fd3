//! Why touching a mapping of a file raised SIGBUS, which the kernel does not say.

use std::fmt::Arguments;

use super::AliasMapping;
use crate::sys::fault_ranges::{Explain, Touch};
use crate::sys::file;
use crate::sys::mm::system_page_bytes;
use crate::sys::stderr_line::stderr_line;
use crate::table::Shown;
use crate::units::{FilePage, WindowPage};

fn tell(page: WindowPage, file_page: FilePage, reason: Arguments<'_>) {
    let (page, file_page) = (page.0, file_page.0);
    stderr_line(format_args!(
        "window page {page} (file page {file_page}): {reason}; the touch raises SIGBUS"
    ));
}

impl Explain for AliasMapping {
    fn explain(&self, touch: Touch) {
        let page_bytes = self.page.bytes();
        let offset = touch.address - self.region.start() as usize;
        let page = WindowPage((offset / page_bytes) as u64);
        // A signal handler must not wait; whoever has the table changes what is shown.
        let Ok(table) = self.table.try_lock() else { return };
        let Shown::File(file_page) = table.get(page).shown() else { return };
        drop(table);
        let part = self.store.parts().of(file_page);
        let within = offset % page_bytes / system_page_bytes() * system_page_bytes();
        let begin = part.offset_of(file_page, self.page) + within as u64;
        match file::facts(part.fd()) {
            Ok(facts) if facts.size_bytes <= begin => {
                let size = facts.size_bytes;
                return tell(
                    page,
                    file_page,
                    format_args!("the file ends before it, at byte {size}"),
                );
            }
            Ok(_) => {}
            Err(errno) => return tell(page, file_page, format_args!("{errno}")),
        }
        let free = file::free_bytes_beside(part.fd()).unwrap_or(u64::MAX);
        match &part.name {
            Some(path) if free < system_page_bytes() as u64 => {
                let path = path.display();
                tell(
                    page,
                    file_page,
                    format_args!(
                    "the file system of {path} has {free} bytes free, and the page is a hole that \
                     needs some: make room there"
                ),
                );
            }
            _ => tell(
                page,
                file_page,
                format_args!("the kernel cannot load it; call populate() to see why"),
            ),
        }
    }
}
