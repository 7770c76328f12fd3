//! The binding: `fremap._core`, which the Python package wraps.
//!
//! The binding decides nothing. It converts arguments to the core's types, releases the GIL, calls
//! the core, and converts its answer or error back. The GIL alone guards no state: every class is
//! frozen, and may be used from several threads at once, with or without a GIL.

#![deny(unsafe_code)]

mod call;
mod errors;
mod probe;
mod provider;
mod raw;
mod rows;
mod selection;
mod shared_slots;
mod slot_table;
mod store;
mod views;
mod window;

/// What the core needs for a step that has begun is there, whatever the process may have.
#[global_allocator]
static ALLOCATOR: fremap_core::sys::reserve::Reserve = fremap_core::sys::reserve::Reserve;

/// The compiled core. Internal: `fremap` wraps everything that users see.
#[pyo3::pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::probe::{
        available_memory, calibrate, capabilities, clear_failures, default_calibration,
        inject_failure, inject_short, system_calls,
    };
    #[pymodule_export]
    use crate::provider::end_with;
    #[pymodule_export]
    use crate::rows::{look, Pending, Rows};
    #[pymodule_export]
    use crate::shared_slots::{list_shared_slots, remove_shared_slots, SharedSlots, SharedTaken};
    #[pymodule_export]
    use crate::slot_table::{SlotTable, Taken};
    #[pymodule_export]
    use crate::store::Store;
    #[pymodule_export]
    use crate::window::{remap_file_pages, Pin, WindowBase};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("system_page_bytes", fremap_core::sys::mm::system_page_bytes())
    }
}
