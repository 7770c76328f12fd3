//! Processes by their number and start time, so that a later process with the same number is not
//! mistaken for an earlier one.

use std::fs::File;
use std::io::Read;

use rustix::io::Errno;
use rustix::process::{test_kill_process, Pid};

use super::call::{enter, errno_of, Call};

/// A process of this machine, told by one that sees the same process numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its number.
    pub process: u32,
    /// When it began, in ticks since the machine did; so many bits tell 497 days apart.
    pub began: u32,
}

/// What `/proc/[pid]/stat` says.
struct Stat {
    state: u8,
    threads: u64,
    began: u32,
}

fn stat(process: u32) -> Result<Stat, Errno> {
    enter(Call::Open)?;
    let path = format!("/proc/{process}/stat");
    let mut file = File::open(path).map_err(|error| errno_of(&error))?;
    // The name of a program is cut to 15 bytes, and there are 52 numbers.
    let mut text = [0; 1536];
    let count = file.read(&mut text).map_err(|error| errno_of(&error))?;
    parsed(&text[..count]).ok_or(Errno::IO)
}

/// Fields 3, 20 and 22; the second is the program's name, and may have anything in it.
fn parsed(text: &[u8]) -> Option<Stat> {
    let behind = text.iter().rposition(|&byte| byte == b')')? + 1;
    let mut fields = std::str::from_utf8(&text[behind..]).ok()?.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let threads = fields.nth(16)?.parse().ok()?;
    let began: u64 = fields.nth(1)?.parse().ok()?;
    Some(Stat { state, threads, began: began as u32 })
}

impl Owner {
    /// This process.
    ///
    /// # Errors
    /// ENOENT without `/proc`.
    pub fn this() -> Result<Self, Errno> {
        let process = super::process::id();
        Ok(Self { process, began: stat(process)?.began })
    }

    /// Whether the process is there. Where that cannot be found out, it counts as there.
    pub(crate) fn lives(self) -> bool {
        let Some(pid) = i32::try_from(self.process).ok().and_then(Pid::from_raw) else {
            return false;
        };
        if test_kill_process(pid) == Err(Errno::SRCH) {
            return false;
        }
        match stat(self.process) {
            // Dead, and only its parent does not know yet. A process whose first thread has
            // ended looks the same, but for its other threads.
            Ok(Stat { state: b'Z' | b'X', threads: 0 | 1, .. }) => false,
            Ok(Stat { began, .. }) => began == self.began,
            Err(Errno::NOENT | Errno::SRCH) => test_kill_process(pid) != Err(Errno::SRCH),
            Err(_) => true,
        }
    }
}

/// Whether the link `/proc/self` names a process by the number that it has for itself.
fn names(link: &[u8], process: u32) -> bool {
    link == process.to_string().as_bytes()
}

/// The namespaces that process numbers and starting times are told in, as numbers of files.
///
/// # Errors
/// ENOENT without `/proc`; EXDEV where it shows the processes of another PID namespace.
pub(crate) fn namespaces() -> Result<[u64; 2], Errno> {
    enter(Call::Stat)?;
    let own = rustix::fs::readlink("/proc/self", Vec::new())?;
    if !names(own.to_bytes(), super::process::id()) {
        return Err(Errno::XDEV);
    }
    let processes = rustix::fs::stat("/proc/self/ns/pid")?.st_ino;
    // Since Linux 5.6; before, all have the same time.
    let times = rustix::fs::stat("/proc/self/ns/time").map_or(0, |stat| stat.st_ino);
    Ok([processes, times])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_lives_until_it_ends() {
        let this = Owner::this().unwrap();
        assert_eq!(this.process, std::process::id());
        assert!(this.lives());
        assert!(!Owner { began: this.began.wrapping_sub(1), ..this }.lives(), "another process");
        // SAFETY: the child waits to be killed, and does nothing else.
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                loop {
                    libc::pause();
                }
            }
            child
        };
        let process = u32::try_from(child).unwrap();
        let owner = Owner { process, began: stat(process).unwrap().began };
        assert!(owner.lives());
        let mut status = 0;
        // SAFETY: the child is this process's own. It is not reaped by the first wait.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            let mut told = std::mem::zeroed();
            libc::waitid(libc::P_PID, process, &raw mut told, libc::WEXITED | libc::WNOWAIT);
        }
        assert!(!owner.lives(), "dead and not reaped");
        // SAFETY: as above.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(!owner.lives(), "gone");
    }

    #[test]
    fn another_namespaces_proc_is_told_by_what_it_calls_this_process() {
        assert!(namespaces().is_ok());
        assert!(names(b"5284", 5284));
        assert!(!names(b"5284", 1) && !names(b"5284", 528) && !names(b"", 1));
    }

    #[test]
    fn what_the_kernel_says_is_read_whatever_a_program_is_called() {
        let numbers: Vec<String> = (4..53).map(|field| field.to_string()).collect();
        let text = format!("7 (a) R (b) S {}", numbers.join(" "));
        let stat = parsed(text.as_bytes()).unwrap();
        assert_eq!((stat.state, stat.threads, stat.began), (b'S', 20, 22));
        assert!(parsed(b"7 (a) S 1 2").is_none());
    }
}
