//! Lines on stderr, for failures that cannot be reported to any caller.

use std::fmt::{Arguments, Write};

/// The longest line; longer ones are cut off.
const LINE_BYTES: usize = 1024;

/// A line on the stack, as signal handlers may not allocate.
struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        // One byte is kept for the end of the line.
        let room = LINE_BYTES - 1 - self.len;
        let taken = text.len().min(room);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        Ok(())
    }
}

/// Writes `fremap: ` and a line to stderr, in one call. A line that cannot be
/// written is lost: `eprintln!` would panic, and the thread that serves faults
/// must not end because nobody reads what it says. May be called in a signal handler.
pub(crate) fn stderr_line(line: Arguments<'_>) {
    let mut text = Line { bytes: [0; LINE_BYTES], len: 0 };
    if text.write_str("fremap: ").and_then(|()| text.write_fmt(line)).is_ok() {
        text.bytes[text.len] = b'\n';
        // SAFETY: the bytes are valid for the call.
        unsafe { libc::write(libc::STDERR_FILENO, text.bytes.as_ptr().cast(), text.len + 1) };
    }
}
