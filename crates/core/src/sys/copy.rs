//! Copies from a map of a file that end in an error, not in SIGBUS, when the
//! file is cut short meanwhile.

/// Whether this process can recover from SIGBUS while it copies, and if not, why.
///
/// # Errors
/// The reason, for people.
pub fn recovery_available() -> Result<(), String> {
    Err("copies from a map of the file are not made yet".into())
}
