//! The SIGBUS handler, and the handlers that were there before it.
//!
//! Everything that runs in the signal allocates nothing, takes no lock and
//! cannot panic. A SIGBUS that is not a copy's is handed to the handler found
//! when ours was installed. Should that one hand it back (because it was
//! installed later than ours and keeps ours as *its* previous one), or raise it
//! anew while it runs, the handler found before it is next, and so on to the
//! kernel's default: no two handlers can send a signal round in circles.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::Mutex;

use rustix::io::Errno;

use super::super::call::{enter, Call};
use super::super::mm::{check, last_errno};
use super::routine;

/// How often the handler is put back in front of others before it gives up: two
/// libraries that both insist would do so for ever.
const INSTALL_LIMIT: u32 = 16;
/// Threads that may be inside an older handler at once and be told apart.
const NESTED_LIMIT: usize = 64;
/// The largest `si_code` of a SIGBUS that an instruction caused (`BUS_MCEERR_AR`).
const LAST_FAULT_CODE: i32 = 4;

/// The registers that the handler looks at.
const R8: usize = libc::REG_R8.unsigned_abs() as usize;
const R9: usize = libc::REG_R9.unsigned_abs() as usize;
const RIP: usize = libc::REG_RIP.unsigned_abs() as usize;

/// A handler that ours was installed in front of. Never freed, as a signal may
/// be on its way to it.
struct Previous {
    action: libc::sigaction,
    /// An `SA_RESETHAND` handler has had its one signal.
    spent: AtomicBool,
    older: *const Previous,
}

/// A thread that is inside a previous handler.
struct Nested {
    thread: AtomicI32,
    /// Where its frame lies: one that is entered later lies below it.
    frame: AtomicUsize,
    previous: AtomicPtr<Previous>,
}

static NEWEST: AtomicPtr<Previous> = AtomicPtr::new(ptr::null_mut());
static INSTALLED: AtomicU32 = AtomicU32::new(0);
static INSTALLING: Mutex<()> = Mutex::new(());
static NESTED: [Nested; NESTED_LIMIT] = [const {
    Nested {
        thread: AtomicI32::new(0),
        frame: AtomicUsize::new(0),
        previous: AtomicPtr::new(ptr::null_mut()),
    }
}; NESTED_LIMIT];

fn describe(what: &str, errno: Errno) -> String {
    format!("{what}: {}", std::io::Error::from(errno))
}

/// The action for SIGBUS; replaced when a new one is given.
fn action(new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    enter(Call::SignalAction)?;
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or a whole action; the kernel fills `old`, which is
    // plain data and was zeroed.
    unsafe {
        check(libc::sigaction(libc::SIGBUS, new, old.as_mut_ptr()))?;
        Ok(old.assume_init())
    }
}

fn is_ours(action: &libc::sigaction) -> bool {
    action.sa_sigaction == handle as *const () as usize
}

/// Whether the calling thread lets SIGBUS through: the kernel kills a process
/// that faults with it blocked.
fn is_blocked() -> Result<bool, Errno> {
    enter(Call::SignalMask)?;
    let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: no new mask is given; the kernel fills `mask`.
    unsafe {
        match libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr()) {
            0 => Ok(libc::sigismember(mask.as_ptr(), libc::SIGBUS) == 1),
            _ => Err(last_errno()),
        }
    }
}

/// Whether our handler is the first to see SIGBUS; an error where it cannot be.
fn is_first() -> Result<bool, String> {
    if is_blocked().map_err(|errno| describe("pthread_sigmask", errno))? {
        return Err("SIGBUS is blocked in this thread".into());
    }
    let first = is_ours(&action(None).map_err(|errno| describe("sigaction", errno))?);
    if !first && INSTALLED.load(Ordering::Relaxed) >= INSTALL_LIMIT {
        return Err("other handlers of SIGBUS keep replacing the one that recovers".into());
    }
    Ok(first)
}

pub(super) fn available() -> Result<(), String> {
    is_first().map(|_first| ())
}

/// Makes sure that our handler is the first to see SIGBUS.
pub(super) fn ensure() -> Result<(), String> {
    if is_first()? {
        return Ok(());
    }
    // Never waits: in a child of fork the lock's holder may not exist.
    let Ok(_installing) = INSTALLING.try_lock() else {
        return Err("another thread is installing the handler".into());
    };
    install().map_err(|errno| describe("sigaction", errno))
}

fn install() -> Result<(), Errno> {
    let found = action(None)?;
    if is_ours(&found) {
        return Ok(());
    }
    // The previous handler is published before ours can run and look for it.
    let older = NEWEST.load(Ordering::Acquire);
    let previous =
        Box::into_raw(Box::new(Previous { action: found, spent: AtomicBool::new(false), older }));
    NEWEST.store(previous, Ordering::Release);
    // SAFETY: all zero is an action without flags and with an empty mask.
    let mut ours = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    ours.sa_sigaction = handle as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    if let Err(errno) = action(Some(&ours)) {
        NEWEST.store(older, Ordering::Release);
        return Err(errno);
    }
    INSTALLED.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// The handler. Registers say whether a copy faulted, and on its source.
#[expect(clippy::cast_sign_loss, clippy::cast_possible_wrap, reason = "registers hold addresses")]
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t` and a `ucontext_t` that live as
    // long as the handler runs; nothing else refers to them.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = |register: usize| registers[register] as usize;
        let source = at(R8)..at(R9);
        if let Some(way_out) = routine::way_out(at(RIP)) {
            if source.contains(&((*info).si_addr() as usize)) {
                registers[RIP] = way_out as i64;
                return;
            }
        }
        let errno = libc::__errno_location();
        let before = *errno;
        chain(signal, info, context);
        *errno = before;
    }
}

/// Hands a signal to the handler that was there before, or before that.
///
/// # Safety
/// In a signal handler, with its own arguments.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: gettid takes nothing and cannot fail.
    let thread = unsafe { libc::gettid() };
    let mark = 0_u8;
    let frame = ptr::from_ref(&mark) as usize;
    let mut previous = NEWEST.load(Ordering::Acquire).cast_const();
    let mut innermost = usize::MAX;
    for nested in &NESTED {
        let outer = nested.frame.load(Ordering::Relaxed);
        if nested.thread.load(Ordering::Relaxed) == thread && frame < outer && outer < innermost {
            innermost = outer;
            // SAFETY: previous handlers are never freed.
            previous = unsafe { (*nested.previous.load(Ordering::Relaxed)).older };
        }
    }
    if previous.is_null() {
        // SAFETY: in a handler, with its arguments.
        unsafe { die(signal, info, thread) };
        return;
    }
    let slot = NESTED.iter().find(|nested| {
        nested.thread.compare_exchange(0, -1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    });
    if let Some(nested) = slot {
        nested.frame.store(frame, Ordering::Relaxed);
        nested.previous.store(previous.cast_mut(), Ordering::Relaxed);
        nested.thread.store(thread, Ordering::Relaxed);
    }
    // SAFETY: previous handlers are never freed; the arguments are the handler's.
    unsafe { call(&*previous, signal, info, context, thread) };
    if let Some(nested) = slot {
        nested.thread.store(0, Ordering::Relaxed);
    }
}

/// Does what the kernel would have done with an action.
///
/// # Safety
/// In a signal handler, with its own arguments.
unsafe fn call(
    previous: &Previous,
    signal: i32,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    thread: i32,
) {
    let action = &previous.action;
    let once = action.sa_flags & libc::SA_RESETHAND != 0;
    // SAFETY: the action was the kernel's, so its handler is a function of the
    // kind that its flags say; the arguments are the handler's.
    unsafe {
        if action.sa_sigaction == libc::SIG_IGN && !is_fault(info) {
            return;
        }
        let none = action.sa_sigaction == libc::SIG_DFL || action.sa_sigaction == libc::SIG_IGN;
        if none || (once && previous.spent.swap(true, Ordering::Relaxed)) {
            die(signal, info, thread);
            return;
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const action.sa_mask, ptr::null_mut());
        if action.sa_flags & libc::SA_NODEFER != 0 {
            let mut this = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
            libc::sigaddset(&raw mut this, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const this, ptr::null_mut());
        }
        if action.sa_flags & libc::SA_SIGINFO != 0 {
            type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);
            std::mem::transmute::<usize, Handler>(action.sa_sigaction)(signal, info, context);
        } else {
            type Handler = extern "C" fn(i32);
            std::mem::transmute::<usize, Handler>(action.sa_sigaction)(signal);
        }
    }
}

/// Whether an instruction caused the signal, and will again when it is run again.
///
/// # Safety
/// `info` is a handler's argument.
unsafe fn is_fault(info: *const libc::siginfo_t) -> bool {
    // SAFETY: as promised.
    let code = unsafe { (*info).si_code };
    (1..=LAST_FAULT_CODE).contains(&code)
}

/// Puts the kernel's default back, which ends the process: at once when the
/// instruction is run again, else by the same signal sent once more.
///
/// # Safety
/// In a signal handler, with its own arguments.
unsafe fn die(signal: i32, info: *const libc::siginfo_t, thread: i32) {
    // SAFETY: all zero is the default action; both calls may be made in a handler.
    unsafe {
        let default = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        libc::sigaction(signal, &raw const default, ptr::null_mut());
        if !is_fault(info) {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal);
        }
    }
}
