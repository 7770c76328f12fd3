//! Lines on stderr from where nobody can be told otherwise.

use std::fmt::{Arguments, Write};

/// Writes `fremap: ` and a line to stderr, in one call. A line that cannot be
/// written is lost: `eprintln!` would panic, and the thread that serves faults
/// must not end because nobody reads what it says.
pub fn tell(line: Arguments<'_>) {
    let mut text = String::from("fremap: ");
    if text.write_fmt(line).is_ok() {
        text.push('\n');
        // SAFETY: the bytes are valid for the call.
        unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    }
}
