//! Stores whose pages other processes provide.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;

use super::provider::{Provider, ProviderOptions};
use super::{check_size, checked_page_size, Opened, Store, StoreKind};
use crate::error::{Error, Interrupt, Result};
use crate::sys::file as sys_file;
use crate::sys::span::Span;
use crate::units::FilePage;

impl Store {
    /// A store of `size_bytes` bytes that nobody has until a program provides them. `name` is
    /// what messages call it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a page, a size or a number of processes that cannot be;
    /// [`Error::Io`] without memory or descriptors.
    pub fn provided(
        size_bytes: u64,
        page_bytes: Option<u64>,
        name: Option<PathBuf>,
        options: ProviderOptions,
    ) -> Result<Self> {
        let page_size = checked_page_size(page_bytes)?;
        check_size(size_bytes)?;
        let provider = Provider::new(options, page_size)?;
        // Empty: whoever read it by mistake would find its end, not zeros.
        let fail = |errno| Error::system("ComputedStore", errno);
        let fd: OwnedFd = sys_file::memory_file("fremap-provided").map_err(fail)?;
        let kind = StoreKind::Provided;
        let opened = Opened { kind, path: name, writable: false, fd, direct_fd: None, size_bytes };
        let mut store = Self::new(opened, page_size)?;
        store.provider = Some(Arc::new(provider));
        Ok(store)
    }

    /// Whether processes provide the pages: there is no file to map or to read.
    pub(crate) fn is_provided(&self) -> bool {
        self.provider.is_some()
    }

    /// Numbers of the provider processes that run and are not at work.
    #[must_use]
    pub fn provider_processes(&self) -> Vec<i32> {
        self.provider.as_ref().map_or_else(Vec::new, |provider| provider.idle_processes())
    }

    /// Ends provider processes that are not at work; they are started again when needed.
    pub fn rest(&self) {
        if let Some(provider) = &self.provider {
            provider.rest();
        }
    }

    /// Has pages provided; `take` is given the content of each, by its position.
    ///
    /// # Errors
    /// [`Error::Provider`], [`Error::Interrupted`], with the number of pages from the front
    /// that have come.
    pub(crate) fn provide(
        &self,
        wanted: &[FilePage],
        take: &mut dyn FnMut(usize, Span<'_>),
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let Some(provider) = &self.provider else {
            return Err(self.io_error("read", wanted.first().copied(), Errno::BADF));
        };
        let outcome = provider.provide(wanted, take, interrupt);
        let done = outcome.as_ref().map_or_else(Error::completed, |()| wanted.len());
        self.counters.add_read(done * self.page_size.bytes());
        outcome.map_err(|error| error.of_file(self.path()))
    }
}
