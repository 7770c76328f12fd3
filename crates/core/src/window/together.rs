//! Which options of a window can be combined, whatever the kernel.
//!
//! Some options need certain engines. Two options contradict each other if they leave no engine,
//! and so do a few other pairs. `engine="auto"` chooses from the engines that all options leave.

use super::{Budget, Mapping, WindowOptions};
use crate::engine::cached::Tracking;
use crate::engine::EngineKind::{self, Alias, Eager, Paged};
use crate::engine::FaultMode;
use crate::error::{Error, Result};
use crate::trim::ReadAhead;
use crate::units::Prot;

/// Every engine, the one that "auto" prefers first.
pub const ANY_ENGINE: &[EngineKind] = &[Paged, Alias, Eager];

/// What an option needs.
struct Need {
    /// As the user wrote it.
    option: String,
    engines: &'static [EngineKind],
    /// Why no other engine.
    why: &'static str,
}

/// The engines that do all that is asked, the preferred one first.
///
/// # Errors
/// [`Error::Argument`] that names two options of which one rules out the other.
pub(super) fn engines(
    options: &WindowOptions,
    advice: Option<ReadAhead>,
) -> Result<Vec<EngineKind>> {
    check_pairs(options)?;
    let mut engines = ANY_ENGINE.to_vec();
    let mut met: Vec<Need> = Vec::new();
    for need in needs(options, advice) {
        let clash = |other: &Need| !need.engines.iter().any(|kind| other.engines.contains(kind));
        if let Some(other) = met.iter().find(|other| clash(other)) {
            return Err(contradiction(
                &other.option,
                &need.option,
                &format!("{} {}", need.option, need.why),
                "leave one of them out",
            ));
        }
        engines.retain(|kind| need.engines.contains(kind));
        met.push(need);
    }
    Ok(engines)
}

fn contradiction(one: &str, other: &str, why: &str, instead: &str) -> Error {
    Error::Argument(format!("Window: {one} and {other} contradict each other: {why}; {instead}"))
}

/// What each option that was given needs, the engine itself first.
fn needs(options: &WindowOptions, advice: Option<ReadAhead>) -> impl Iterator<Item = Need> {
    let engine = options.engine.map(|kind| Need {
        option: format!("engine=\"{kind}\""),
        engines: match kind {
            Paged => &[Paged],
            Alias => &[Alias],
            Eager => &[Eager],
        },
        why: "",
    });
    let coherent = options.coherent.map(|coherent| {
        if coherent {
            Need {
                option: "coherent=True".to_owned(),
                engines: &[Alias],
                why: "needs engine=\"alias\", as the others show copies of the file",
            }
        } else {
            Need {
                option: "coherent=False".to_owned(),
                engines: &[Paged, Eager],
                why: "needs engine=\"paged\" or \"eager\", as \"alias\" shows the file itself",
            }
        }
    });
    let fault = (options.fault == FaultMode::Signal).then(|| Need {
        option: "fault=\"signal\"".to_owned(),
        engines: &[Paged],
        why: "needs engine=\"paged\", the only one whose faults fremap resolves",
    });
    let tracking = options.tracking.map(|tracking| Need {
        option: format!("tracking=\"{}\"", tracking_name(tracking)),
        engines: &[Paged],
        why: "needs engine=\"paged\", the only one that can notice writes in two ways",
    });
    let advice = advice.map(|advice| Need {
        option: format!("advice=\"{}\"", advice_name(advice)),
        engines: &[Alias],
        why: "needs engine=\"alias\", the only one whose pages the kernel loads",
    });
    [engine, coherent, fault, tracking, advice].into_iter().flatten()
}

/// Refuses pairs that no engine can do.
fn check_pairs(options: &WindowOptions) -> Result<()> {
    let bytes = match options.budget {
        Budget::Bytes(bytes) => Some(format!("budget={bytes}")),
        Budget::Auto | Budget::Unlimited => None,
    };
    if options.lock && options.nonblock {
        return Err(contradiction(
            "lock=True",
            "nonblock=True",
            "the first loads every page, the second only pages that need no I/O",
            "leave one of them out",
        ));
    }
    if options.nonblock && !options.populate {
        return Err(contradiction(
            "nonblock=True",
            "populate=False",
            "nonblock says which pages populate loads",
            "pass populate=True too, or leave nonblock out",
        ));
    }
    if let (true, Some(budget)) = (options.lock, &bytes) {
        return Err(contradiction(
            "lock=True",
            budget,
            "locked pages stay in memory, so none can be evicted to keep to a budget",
            "leave the budget out",
        ));
    }
    if let (FaultMode::Signal, Some(budget)) = (options.fault, &bytes) {
        return Err(contradiction(
            "fault=\"signal\"",
            budget,
            "a signal handler cannot evict or write pages",
            "use fault=\"thread\", or budget=None",
        ));
    }
    if let (Some(tracking), Prot::Read) = (options.tracking, options.prot) {
        return Err(contradiction(
            &format!("tracking=\"{}\"", tracking_name(tracking)),
            "prot=Prot.READ",
            "the window is read-only, so there are no writes to notice",
            "leave tracking out, or pass prot=Prot.WRITE",
        ));
    }
    let mapping = match options.mapping {
        Mapping::Linear => None,
        Mapping::None => Some("mapping=\"none\""),
        Mapping::List(_) => Some("a mapping of file pages"),
    };
    if let (Some(mapping), true) = (mapping, options.first_page != 0) {
        return Err(contradiction(
            &format!("first_page={}", options.first_page),
            mapping,
            "first_page says where the linear mapping begins",
            "leave one of them out",
        ));
    }
    Ok(())
}

fn tracking_name(tracking: Tracking) -> &'static str {
    match tracking {
        Tracking::Kernel => "async",
        Tracking::Faults => "sync",
        Tracking::Content => "content",
    }
}

fn advice_name(advice: ReadAhead) -> &'static str {
    match advice {
        ReadAhead::Normal => "normal",
        ReadAhead::Random => "random",
        ReadAhead::Sequential => "sequential",
    }
}
