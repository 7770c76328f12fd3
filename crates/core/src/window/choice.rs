//! Which engine a window gets, and how it notices writes.

use std::sync::Arc;

use rustix::io::Errno;

use super::{Budget, WindowOptions};
use crate::engine::cached::Tracking;
use crate::engine::{EngineKind, FaultMode};
use crate::error::{Error, Result};
use crate::memory::Ask;
use crate::store::Store;
use crate::sys::uffd::Uffd;
use crate::sys::{probe, signal};
use crate::trim::Limit;
use crate::units::Prot;

/// Refuses a window that may not be touched, and a writable one without `coherent`.
pub(super) fn check_prot(options: &WindowOptions) -> Result<()> {
    match (options.prot, options.coherent) {
        (Prot::None, _) => Err(Error::Argument(
            "Window: prot must be READ or WRITE; call protect(pages, NONE) to deny access to pages"
                .to_owned(),
        )),
        (Prot::Write, None) => Err(Error::Argument(
            "Window: a writable window needs coherent=True (others see each write at once) or \
             coherent=False (writes reach the store on flush)"
                .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// The engines that work with a store: `alias` needs a file.
///
/// # Errors
/// [`Error::Unsupported`] with what to ask for instead.
pub(super) fn for_store(
    store: &Store,
    mut engines: Vec<EngineKind>,
    options: &WindowOptions,
) -> Result<Vec<EngineKind>> {
    if !store.is_provided() {
        return Ok(engines);
    }
    let refused = |reason: &str| {
        let reason = format!("{} {reason}", store.describe());
        Err(Error::Unsupported { operation: "Window", reason })
    };
    engines.retain(|&kind| kind != EngineKind::Alias);
    if engines.is_empty() {
        return refused(
            "has no file that engine \"alias\" (coherent=True) could map; use engine=\"paged\", or \
             leave both out",
        );
    }
    if options.prot == Prot::Write {
        return refused("cannot be written to; use prot=Prot.READ");
    }
    if options.fault == FaultMode::Signal {
        return refused(
            "gets its pages from other processes, which a signal handler cannot ask; use \
             fault=\"thread\"",
        );
    }
    Ok(engines)
}

/// The first of these engines that works here, or why the only one does not.
///
/// # Errors
/// [`Error::Unsupported`] with what to ask for instead.
///
/// # Panics
/// If there is none among them.
pub fn choose_engine(engines: &[EngineKind], prot: Prot) -> Result<EngineKind> {
    let unsupported = |reason: String| Err(Error::Unsupported { operation: "Window", reason });
    probe::check_kernel("Window")?;
    let paged =
        |prot| Ok::<_, Error>(has_userfaultfd()? && (prot == Prot::Read || notices_stores()?));
    let kind = *engines.first().expect("an engine to choose");
    match engines.get(1) {
        _ if kind != EngineKind::Paged || paged(prot)? => Ok(kind),
        Some(&other) => Ok(other),
        None if !paged(Prot::Read)? => unsupported(format!(
            "engine \"paged\" needs userfaultfd, which this process may not use; to get it: {}; \
             or use engine=\"alias\" or \"eager\"",
            probe::userfaultfd_remedy()
        )),
        None => unsupported(format!(
            "a writable window of engine \"paged\" needs write protection by userfaultfd; to get \
             it: {}; or use engine=\"eager\", or coherent=True",
            probe::userfaultfd_feature_remedy("uffd_wp")
        )),
    }
}

/// Whether userfaultfd reports writes.
fn notices_stores() -> Result<bool> {
    let features = Uffd::supported().map_err(|errno| Error::system("Window", errno))?;
    Ok(features.write_protect())
}

/// Whether userfaultfd works here. A limit that is reached (descriptors, memory) is
/// an error, not another engine.
fn has_userfaultfd() -> Result<bool> {
    match probe::userfaultfd() {
        Ok(_) => Ok(true),
        Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN)) => {
            Err(Error::system("Window", errno))
        }
        Err(_) => Ok(false),
    }
}

/// How a paged window notices writes; None if it is read-only.
pub(super) fn chosen_tracking(options: &WindowOptions) -> Result<Option<Tracking>> {
    if options.prot != Prot::Write {
        return Ok(None);
    }
    let features = Uffd::supported().map_err(|errno| Error::system("Window", errno))?;
    let notes = features.async_writes() && features.swap();
    match options.tracking {
        Some(Tracking::Kernel) if !notes => Err(Error::Unsupported {
            operation: "Window",
            reason: format!(
                "tracking=\"async\" needs UFFD_FEATURE_WP_ASYNC, PAGEMAP_SCAN and UFFDIO_MOVE; to \
                 get them: {}; or use tracking=\"sync\"",
                probe::userfaultfd_feature_remedy("uffd_move")
            ),
        }),
        Some(asked) => Ok(Some(asked)),
        None if notes => Ok(Some(Tracking::Kernel)),
        None => Ok(Some(Tracking::Faults)),
    }
}

/// The memory that a paged window may take; None without a limit.
pub(super) fn budget(options: &WindowOptions) -> Option<Ask> {
    match options.budget {
        // Locked memory does not leave.
        _ if options.lock => None,
        Budget::Unlimited => None,
        Budget::Bytes(bytes) => Some(Ask::Bytes(bytes)),
        Budget::Auto => Some(Ask::Auto { need: u64::MAX }),
    }
}

/// What an alias window may have mapped; None without a limit.
pub(super) fn limit(options: &WindowOptions) -> Result<Option<Arc<Limit>>> {
    match options.budget {
        // Locked memory does not leave.
        _ if options.lock => Ok(None),
        Budget::Unlimited => Ok(None),
        Budget::Bytes(bytes) => Ok(Some(Limit::new(bytes))),
        Budget::Auto => Limit::automatic().map(Some),
    }
}

/// Fails for an engine whose faults signal handlers cannot resolve.
pub(super) fn check_fault(fault: FaultMode, kind: EngineKind) -> Result<()> {
    if fault == FaultMode::Thread {
        return Ok(());
    }
    let features = Uffd::supported().map_err(|errno| Error::system("Window", errno))?;
    if !features.signals() {
        return Err(Error::unsupported(
            "Window",
            kind,
            "with fault=\"signal\" needs UFFD_FEATURE_SIGBUS, which this kernel does not have; use fault=\"thread\"",
        ));
    }
    check_handler("Window")
}

/// Makes sure that the faults of this thread come to the handler that resolves them.
pub(super) fn check_handler(operation: &'static str) -> Result<()> {
    signal::ensure().map_err(|reason| Error::Unsupported {
        operation,
        reason: format!("fault=\"signal\" needs SIGBUS: {reason}; use fault=\"thread\""),
    })
}

/// Fails for a budget that the engine cannot keep to.
pub(super) fn check_budget(
    options: &WindowOptions,
    kind: EngineKind,
    window_bytes: u64,
) -> Result<()> {
    let Budget::Bytes(bytes) = options.budget else { return Ok(()) };
    if kind != EngineKind::Eager || window_bytes <= bytes {
        return Ok(());
    }
    let reason = "engine \"eager\" cannot reload evicted pages on access, so it evicts none by \
                  itself: leave the budget out and call evict(), or use engine=\"paged\"";
    Err(Error::Unsupported { operation: "Window", reason: reason.to_owned() })
}
