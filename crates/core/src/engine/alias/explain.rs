//! Why touching a mapping of a file raised SIGBUS, which the kernel does not say.

use std::fmt::Arguments;

use super::AliasMapping;
use crate::engine::tell_why;
use crate::sys::fault_ranges::{Explain, Touch};
use crate::sys::file;
use crate::sys::mm::system_page_bytes;
use crate::table::Shown;
use crate::units::WindowPage;

impl Explain for AliasMapping {
    fn explain(&self, touch: Touch) {
        let page_bytes = self.page.bytes();
        let offset = touch.address - self.region.start() as usize;
        let page = WindowPage((offset / page_bytes) as u64);
        // A signal handler must not wait; whoever has the table changes what is shown.
        let Ok(table) = self.table.try_lock() else { return };
        let entry = table.get(page);
        let Shown::File(file_page) = entry.shown() else { return };
        drop(table);
        let tell = |reason: Arguments<'_>| tell_why(page, entry, "SIGBUS", reason);
        let part = self.store.parts().of(file_page);
        let within = offset % page_bytes / system_page_bytes() * system_page_bytes();
        let begin = part.offset_of(file_page, self.page) + within as u64;
        match file::facts(part.fd()) {
            Ok(facts) if facts.size_bytes <= begin => {
                let size = facts.size_bytes;
                return tell(format_args!("the file ends before it, at byte {size}"));
            }
            Ok(_) => {}
            Err(errno) => return tell(format_args!("{errno}")),
        }
        let free = file::free_bytes_beside(part.fd()).unwrap_or(u64::MAX);
        match &part.name {
            Some(path) if free < system_page_bytes() as u64 => tell(format_args!(
                "the file system of {} has {free} bytes free, and the page is a hole that needs \
                 some: make room there",
                path.display()
            )),
            _ => tell(format_args!("the kernel cannot load it; call populate() to see why")),
        }
    }
}
