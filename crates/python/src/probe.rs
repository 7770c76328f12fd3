//! What the kernel can do, what operations cost here, and how many system calls were made.

use fremap_core::calibrate::Calibration;
use fremap_core::error::Error;
use fremap_core::memory;
use fremap_core::sys::call::{self, Call};
use fremap_core::sys::probe;
use fremap_core::units::Prot;
use fremap_core::window::{choose_engine, ANY_ENGINE};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};

use crate::call::run_short;

/// What this kernel and process may do, found out by trying.
#[pyfunction]
pub fn capabilities(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let probes = PyDict::new(py);
    for probe in py.detach(probe::capabilities) {
        let feature = probe.feature;
        let facts = (feature.since, feature.used_for, feature.without);
        probes.set_item(feature.name, (probe.available, probe.detail, probe.remedy, facts))?;
    }
    let engines = PyDict::new(py);
    for &kind in ANY_ENGINE {
        let refusal = py.detach(|| choose_engine(&[kind], Prot::Read)).err();
        engines.set_item(kind.to_string(), refusal.map(|error| error.to_string()))?;
    }
    let chosen = run_short(py, || match choose_engine(ANY_ENGINE, Prot::Read) {
        Err(Error::Unsupported { .. }) => Ok("none".to_owned()),
        found => found.map(|kind| kind.to_string()),
    })?;
    let answer = PyDict::new(py);
    answer.set_item("kernel", probe::kernel_release())?;
    answer.set_item("max_map_count", probe::max_map_count())?;
    answer.set_item("memlock_limit", probe::memlock_limit())?;
    answer.set_item("available_bytes", memory::available().ok())?;
    answer.set_item("probes", probes)?;
    answer.set_item("engines", engines)?;
    answer.set_item("chosen", chosen)?;
    Ok(answer)
}

/// Bytes that this process may still have: of the machine, and of its memory cgroups.
#[pyfunction]
pub fn available_memory(py: Python<'_>) -> PyResult<u64> {
    let fail = |errno| Error::system("available_memory", errno);
    run_short(py, || memory::available().map_err(fail))
}

/// What things cost here, measured now.
#[pyfunction]
pub fn calibrate(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    by_name(py, run_short(py, fremap_core::calibrate::measure)?)
}

/// What windows use where nothing was measured.
#[pyfunction]
pub fn default_calibration(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    by_name(py, Calibration::default())
}

fn by_name(py: Python<'_>, calibration: Calibration) -> PyResult<Bound<'_, PyDict>> {
    let fields = [
        ("alias_extent_pages", calibration.alias_extent_pages),
        ("evict_gap_pages", calibration.evict_gap_pages),
        ("batch_pages", calibration.batch_pages),
    ];
    fields.into_py_dict(py)
}

/// System calls of each kind that this process has made through the core.
#[pyfunction]
pub fn system_calls(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    Call::ALL.iter().map(|&kind| (kind.name(), call::count(kind))).into_py_dict(py)
}

/// For tests: lets `skip` calls of a kind through, then fails the next `failures`.
#[pyfunction]
pub fn inject_failure(call: &str, skip: u32, errno: i32, failures: u32) -> PyResult<()> {
    let errno = rustix::io::Errno::from_raw_os_error(errno);
    call::inject(kind_of(call)?, skip, errno, failures);
    Ok(())
}

/// For tests: lets `skip` calls of a kind through; the next `times` move no more than
/// `most_bytes`.
#[pyfunction]
pub fn inject_short(call: &str, skip: u32, most_bytes: u32, times: u32) -> PyResult<()> {
    call::inject_short(kind_of(call)?, skip, most_bytes, times);
    Ok(())
}

fn kind_of(call: &str) -> PyResult<Call> {
    let kind = Call::ALL.iter().copied().find(|kind| kind.name() == call);
    kind.ok_or_else(|| PyValueError::new_err(format!("no system call {call:?}")))
}

/// For tests: lets every call through again.
#[pyfunction]
pub fn clear_failures() {
    call::clear();
}
