//! Processes that this one starts and communicates with.
//!
//! They are started by `posix_spawn`, which runs no `pthread_atfork` handlers and copies no memory,
//! so a thread that serves faults may start one. Each end of a connection notices when the other is
//! gone: the socket is hung up, or the process has exited.

use std::ffi::{CStr, CString, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType};
use rustix::process::{self, Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

use super::call::{answered, enter, Call};
use super::thread::spawn_without_signals;

/// The first descriptor that a child is given; the others follow.
pub const FIRST_DESCRIPTOR: i32 = 3;
/// Above all descriptors that a child is given.
const ABOVE: i32 = 16;
/// Between two looks at a child where the kernel has no descriptors of processes (before 5.3).
const LOOK: Duration = Duration::from_millis(5);
/// How long a process may take to end by itself once it is no longer needed.
const GRACE: Duration = Duration::from_secs(2);

/// What to start: a program with its arguments, in the environment of the moment.
#[derive(Debug)]
pub struct Program {
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// `arguments` begin with the path of the program.
    ///
    /// # Errors
    /// EINVAL for no argument, or one that has a zero byte.
    pub fn new(arguments: Vec<OsString>) -> Result<Self, Errno> {
        let text = |text: OsString| CString::new(text.into_vec()).map_err(|_| Errno::INVAL);
        let variables = std::env::vars_os().map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            text(name)
        });
        let environment = variables.collect::<Result<_, _>>()?;
        let arguments: Vec<CString> = arguments.into_iter().map(text).collect::<Result<_, _>>()?;
        if arguments.is_empty() {
            return Err(Errno::INVAL);
        }
        Ok(Self { arguments, environment })
    }

    /// Starts it, in a process group of its own, so that Ctrl-C is not for it; with no signal
    /// blocked or ignored, nothing to read, and `descriptors` as 3, 4, ….
    ///
    /// # Errors
    /// ENOENT, EACCES, EAGAIN, ENOMEM, EMFILE.
    pub fn start(&self, descriptors: &[BorrowedFd<'_>]) -> Result<Child, Errno> {
        // A source must not be one of the numbers that are given away before it.
        let sources = descriptors
            .iter()
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, ABOVE))
            .collect::<Result<Vec<OwnedFd>, Errno>>()?;
        let pointers = |texts: &[CString]| -> Vec<*mut libc::c_char> {
            let texts = texts.iter().map(|text| text.as_ptr().cast_mut());
            texts.chain([std::ptr::null_mut()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let mut pid = 0;
        enter(Call::Spawn)?;
        // SAFETY: the actions and attributes are initialized before they are used and destroyed
        // after; the lists end with null, and what they point to outlives the call.
        let result = unsafe {
            let mut actions = std::mem::zeroed::<libc::posix_spawn_file_actions_t>();
            let mut attributes = std::mem::zeroed::<libc::posix_spawnattr_t>();
            libc::posix_spawn_file_actions_init(&raw mut actions);
            libc::posix_spawnattr_init(&raw mut attributes);
            let result = prepare(&mut actions, &mut attributes, &sources).and_then(|()| {
                answered(libc::posix_spawn(
                    &raw mut pid,
                    self.arguments[0].as_ptr(),
                    &raw const actions,
                    &raw const attributes,
                    arguments.as_ptr(),
                    environment.as_ptr(),
                ))
            });
            libc::posix_spawnattr_destroy(&raw mut attributes);
            libc::posix_spawn_file_actions_destroy(&raw mut actions);
            result
        };
        result?;
        let pid = Pid::from_raw(pid).ok_or(Errno::CHILD)?;
        Ok(Child { pid, handle: process::pidfd_open(pid, PidfdFlags::empty()).ok() })
    }
}

/// # Safety
/// Both are initialized.
unsafe fn prepare(
    actions: &mut libc::posix_spawn_file_actions_t,
    attributes: &mut libc::posix_spawnattr_t,
    sources: &[OwnedFd],
) -> Result<(), Errno> {
    const NOTHING: &CStr = c"/dev/null";
    let flags =
        libc::POSIX_SPAWN_SETPGROUP | libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
    // SAFETY: as the caller says; the sets are plain data that the calls make valid.
    unsafe {
        let (mut none, mut all) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigemptyset(&raw mut none);
        libc::sigfillset(&raw mut all);
        answered(libc::posix_spawnattr_setsigmask(attributes, &raw const none))?;
        answered(libc::posix_spawnattr_setsigdefault(attributes, &raw const all))?;
        answered(libc::posix_spawnattr_setpgroup(attributes, 0))?;
        answered(libc::posix_spawnattr_setflags(attributes, flags as libc::c_short))?;
        let (path, access) = (NOTHING.as_ptr(), libc::O_RDONLY);
        answered(libc::posix_spawn_file_actions_addopen(actions, 0, path, access, 0))?;
        for (source, number) in sources.iter().zip(FIRST_DESCRIPTOR..ABOVE) {
            let source = source.as_raw_fd();
            answered(libc::posix_spawn_file_actions_adddup2(actions, source, number))?;
        }
    }
    Ok(())
}

/// A process that this one has started. It has to be [waited for](Self::retire).
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// Identifies it reliably, even after another thread has waited for it.
    handle: Option<OwnedFd>,
}

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// Somebody else knows.
    Unknown,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(status) => write!(out, "ended with status {status}"),
            Self::Signal(signal) => write!(out, "was ended by signal {signal}"),
            Self::Unknown => out.write_str("has ended"),
        }
    }
}

impl Child {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        // It may have ended already.
        let _gone = match &self.handle {
            Some(handle) => process::pidfd_send_signal(handle, Signal::KILL),
            None => process::kill_process(self.pid, Signal::KILL),
        };
    }

    /// Waits until it has ended, at most for `limit`.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Option<Ended> {
        let begin = Instant::now();
        loop {
            match process::waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(Some((_, status))) => return Some(ended(status)),
                Ok(None) | Err(Errno::INTR) => {}
                // Somebody waits for every child, or SIGCHLD is ignored.
                Err(_) => return Some(Ended::Unknown),
            }
            let left = limit.checked_sub(begin.elapsed())?;
            match &self.handle {
                Some(handle) => {
                    let mut fds = [PollFd::new(handle, PollFlags::IN)];
                    // Whatever ends it, the child is asked about again.
                    let _ended = poll(&mut fds, Some(&timespec(left)));
                }
                None => std::thread::sleep(LOOK.min(left)),
            }
        }
    }

    /// Has it exit within two seconds, or be killed. Does not wait for that.
    pub(crate) fn retire(self) {
        let pid = self.pid;
        let end = move || {
            if self.wait(GRACE).is_none() {
                self.kill();
                let _ended = self.wait(Duration::MAX);
            }
        };
        if spawn_without_signals("fremap-reaper", end).is_err() {
            // No thread is to be had. Nobody has waited for it, so the number is still its own.
            let _killed = process::kill_process(pid, Signal::KILL);
            let _ended = process::waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

fn ended(status: WaitStatus) -> Ended {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => Ended::Exit(status),
        (None, Some(signal)) => Ended::Signal(signal),
        (None, None) => Ended::Unknown,
    }
}

fn timespec(duration: Duration) -> Timespec {
    // The kernel takes no more seconds than these.
    let seconds = duration.as_secs().min(i32::MAX as u64);
    Timespec { tv_sec: seconds.cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}

/// Memory of a fixed size for two processes to share: neither can cut it short under the other.
///
/// # Errors
/// ENOMEM, EMFILE.
pub(crate) fn memory_to_share(name: &str, size_bytes: u64) -> Result<OwnedFd, Errno> {
    use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags, SealFlags};
    enter(Call::Open)?;
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    super::file::truncate(fd.as_fd(), size_bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// One end of a connection that carries whole messages.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// What has come of looking for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A message of this number of bytes.
    Message(usize),
    /// None yet.
    Nothing,
    /// The other end is closed.
    HungUp,
}

impl Channel {
    /// Both ends (`socketpair` of `SOCK_SEQPACKET`).
    ///
    /// # Errors
    /// EMFILE.
    pub(crate) fn pair() -> Result<(Self, OwnedFd), Errno> {
        enter(Call::Open)?;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(ours), theirs))
    }

    /// Sends a short message; false if the other end is closed.
    ///
    /// # Errors
    /// ENOBUFS, EAGAIN where the other end has not taken what was sent before.
    pub fn send(&self, message: &[u8]) -> Result<bool, Errno> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match net::send(&self.0, message, flags) {
                Ok(_) => return Ok(true),
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Takes a message if there is one.
    ///
    /// # Errors
    /// ENOMEM.
    pub(crate) fn receive(&self, message: &mut [u8]) -> Result<Received, Errno> {
        loop {
            match net::recv(&self.0, &mut *message, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(Received::HungUp),
                Ok((count, _)) => return Ok(Received::Message(count)),
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Waits until there is a message or the other end is closed, at most for `limit`.
    pub fn wait(&self, limit: Duration) {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        // Whatever ends it, the caller looks.
        let _woken = poll(&mut fds, Some(&timespec(limit)));
    }

    /// Hangs up, whoever else has this end open.
    pub(crate) fn hang_up(&self) {
        // Fails only where the other end is closed.
        let _closed = net::shutdown(&self.0, Shutdown::Both);
    }
}

/// Ends this process when nobody needs it: a second after `connection` is hung up, or after
/// the process that started this one, `parent`, is gone, whatever this one is doing.
///
/// # Errors
/// EAGAIN at the limit of threads; ESRCH if `parent` is gone already.
pub fn end_with(connection: OwnedFd, parent: i32) -> Result<(), Errno> {
    /// To let it end by itself.
    const GRACE: Duration = Duration::from_secs(1);
    /// Between two looks where the kernel has no descriptors of processes.
    const LOOK: Duration = Duration::from_secs(1);
    let pid = Pid::from_raw(parent).ok_or(Errno::INVAL)?;
    let handle = process::pidfd_open(pid, PidfdFlags::empty()).ok();
    let is_parent = move || process::getppid() == Some(pid);
    if !is_parent() {
        return Err(Errno::SRCH);
    }
    let watch = move || {
        let hung_up = PollFlags::RDHUP | PollFlags::HUP;
        loop {
            let mut fds = vec![PollFd::new(&connection, hung_up)];
            fds.extend(handle.as_ref().map(|handle| PollFd::new(handle, PollFlags::IN)));
            let polled = poll(&mut fds, Some(&timespec(LOOK)));
            if polled.is_ok_and(|ready| ready > 0) || !is_parent() {
                break;
            }
        }
        std::thread::sleep(GRACE);
        // SAFETY: ends the process without running anything of it.
        unsafe { libc::_exit(0) };
    };
    spawn_without_signals("fremap-watch", watch).map(|_running| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        Program::new(["/bin/sh", "-c", script].map(OsString::from).to_vec()).expect("a program")
    }

    #[test]
    fn a_child_has_the_descriptors_that_it_is_given_and_tells_how_it_ended() {
        let (channel, theirs) = Channel::pair().expect("sockets");
        let program = shell("printf first >&4; read line <&0 || exit 7");
        let child = program.start(&[theirs.as_fd(), theirs.as_fd()]).expect("a shell");
        drop(theirs);
        assert_eq!(child.wait(Duration::MAX), Some(Ended::Exit(7)), "there is nothing to read");
        let mut message = [0; 32];
        assert_eq!(channel.receive(&mut message), Ok(Received::Message(5)));
        assert_eq!(&message[..5], b"first");
        assert_eq!(channel.receive(&mut message), Ok(Received::HungUp));
        assert_eq!(channel.send(b"x"), Ok(false));
    }

    #[test]
    fn a_child_is_killed_and_found_nowhere_afterwards() {
        let (channel, theirs) = Channel::pair().expect("sockets");
        // It waits by itself: a program of its own would outlive it.
        let waits = shell("trap '' TERM INT; read line <&3");
        let child = waits.start(&[theirs.as_fd()]).expect("a shell");
        drop(theirs);
        assert_eq!(child.wait(Duration::ZERO), None);
        let mut message = [0; 32];
        assert_eq!(channel.receive(&mut message), Ok(Received::Nothing));
        child.kill();
        assert_eq!(child.wait(Duration::MAX), Some(Ended::Signal(libc::SIGKILL)));
        assert_eq!(child.wait(Duration::MAX), Some(Ended::Unknown), "waited for once");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let missing = Program::new(vec!["/nonexistent/program".into()]).expect("a path");
        assert_eq!(missing.start(&[]).expect_err("not there"), Errno::NOENT);
        assert_eq!(Program::new(vec![]).expect_err("nothing"), Errno::INVAL);
    }
}
