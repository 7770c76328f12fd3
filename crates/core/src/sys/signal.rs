//! The SIGBUS handler, and the handlers that were there before it.
//!
//! Nothing that runs in the signal allocates, panics, or takes a lock that is not made for it. A
//! SIGBUS that belongs neither to a copy nor to a window goes to the handler that was there when
//! fremap's was installed. That handler may hand it back: because it was installed later and
//! keeps fremap's as *its* previous one, or because it raises the signal again. Then the handler
//! before it is next, and so on to the kernel's default. So two handlers cannot pass a signal in
//! circles.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use rustix::io::Errno;

use super::call::{answered, check, enter, Call};
use super::fault_ranges::{self, Touch, Touched};
use super::fork_lock::ForkLock;
use super::thread::send_segv;

/// How often the handler is put back in front of another one than before until it gives up:
/// each is kept, as a signal may be on its way to it.
const INSTALL_LIMIT: u32 = 256;
/// Threads that may be inside an older handler at once and be told apart.
const NESTED_LIMIT: usize = 64;
/// The largest `si_code` of a SIGBUS that an instruction caused (`BUS_MCEERR_AR`).
const LAST_FAULT_CODE: i32 = 4;

/// A handler that ours was installed in front of. Never freed, as a signal may
/// be on its way to it.
struct Previous {
    action: libc::sigaction,
    /// An `SA_RESETHAND` handler has had its one signal.
    spent: AtomicBool,
    older: *const Previous,
}

impl Previous {
    /// Whether `action` is this one, as far as a handler can tell.
    fn is(&self, action: &libc::sigaction) -> bool {
        let blocks = |action: &libc::sigaction, signal| {
            // SAFETY: the set is the kernel's.
            unsafe { libc::sigismember(&raw const action.sa_mask, signal) == 1 }
        };
        self.action.sa_sigaction == action.sa_sigaction
            && self.action.sa_flags == action.sa_flags
            && (1..=libc::SIGRTMAX())
                .all(|signal| blocks(&self.action, signal) == blocks(action, signal))
    }
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
static INSTALLING: ForkLock<()> = ForkLock::new(());
/// What a child that installs the handler needs, made before the fork.
static PREPARED: AtomicPtr<Previous> = AtomicPtr::new(ptr::null_mut());
static NESTED: [Nested; NESTED_LIMIT] = [const {
    Nested {
        thread: AtomicI32::new(0),
        frame: AtomicUsize::new(0),
        previous: AtomicPtr::new(ptr::null_mut()),
    }
}; NESTED_LIMIT];

fn describe(what: &str, errno: Errno) -> String {
    format!("{what}: {}", crate::error::describe(errno))
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
        answered(libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr()))?;
        Ok(libc::sigismember(mask.as_ptr(), libc::SIGBUS) == 1)
    }
}

/// Whether our handler is the first to see SIGBUS; an error where it cannot be.
fn is_first() -> Result<bool, String> {
    if is_blocked().map_err(|errno| describe("pthread_sigmask", errno))? {
        return Err("SIGBUS is blocked in this thread".into());
    }
    let found = action(None).map_err(|errno| describe("sigaction", errno))?;
    let first = is_ours(&found);
    // SAFETY: null, or a previous handler, and these are never freed.
    let newest = unsafe { NEWEST.load(Ordering::Acquire).as_ref() };
    let known = first || newest.is_some_and(|newest| newest.is(&found));
    if !known && INSTALLED.load(Ordering::Relaxed) >= INSTALL_LIMIT {
        return Err("other handlers of SIGBUS keep replacing the one that recovers".into());
    }
    Ok(first)
}

/// Whether our handler can be the first to see SIGBUS in this thread. Installs nothing.
#[cfg(target_arch = "x86_64")]
pub(super) fn available() -> Result<(), String> {
    is_first().map(|_first| ())
}

/// Makes sure that our handler is the first to see SIGBUS: installs it, again if another one
/// has replaced it.
///
/// # Errors
/// Why it is not, for people.
pub fn ensure() -> Result<(), String> {
    if is_first()? {
        return Ok(());
    }
    let _installing = INSTALLING.lock();
    install().map_err(|errno| describe("sigaction", errno))
}

fn install() -> Result<(), Errno> {
    let found = action(None)?;
    if is_ours(&found) {
        return Ok(());
    }
    let older = NEWEST.load(Ordering::Acquire);
    // SAFETY: null, or a previous handler, and these are never freed.
    if let Some(newest) = unsafe { older.as_ref() }.filter(|newest| newest.is(&found)) {
        // The same handler was put in front of ours again, as `faulthandler.enable()` does.
        newest.spent.store(false, Ordering::Relaxed);
        return action(Some(&our_action())).map(|_ours| ());
    }
    let previous = Previous { action: found, spent: AtomicBool::new(false), older };
    install_over(Box::into_raw(Box::new(previous)))?;
    INSTALLED.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Puts our handler in front of the one that is there. `previous` says which that is, and is
/// published before ours can run and look for it.
fn install_over(previous: *mut Previous) -> Result<(), Errno> {
    let older = NEWEST.swap(previous, Ordering::AcqRel);
    let installed = action(Some(&our_action()));
    if installed.is_err() {
        NEWEST.store(older, Ordering::Release);
    }
    installed.map(|_found| ())
}

fn our_action() -> libc::sigaction {
    // SAFETY: all zero is an action without flags and with an empty mask, which is a set
    // that can be filled.
    unsafe {
        let mut ours = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        ours.sa_sigaction = handle as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // Locks may be taken in the handler: nothing may come between.
        libc::sigfillset(&raw mut ours.sa_mask);
        ours
    }
}

/// Makes what a child needs to install the handler, where nothing can be allocated.
pub(super) fn prepare_child() {
    if PREPARED.load(Ordering::Acquire).is_null() {
        // SAFETY: all zero is the default action.
        let action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
        let previous = Previous { action, spent: AtomicBool::new(false), older: ptr::null() };
        PREPARED.store(Box::into_raw(Box::new(previous)), Ordering::Release);
    }
}

/// Installs the handler in a child of fork, before `fork` returns there.
pub(super) fn install_in_child() {
    let Ok(found) = action(None) else { return };
    let prepared = PREPARED.swap(ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: null, or made by `prepare_child` and given to nobody.
    let Some(previous) = (unsafe { prepared.as_mut() }) else { return };
    if is_ours(&found) {
        PREPARED.store(prepared, Ordering::Release);
        return;
    }
    previous.action = found;
    previous.older = NEWEST.load(Ordering::Acquire);
    // Where that fails, touches are the SIGBUS of whoever has the handler.
    let _installed = install_over(prepared);
}

/// The handler: a copy's fault is its error, a window's is resolved, others are handed on.
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t` and a `ucontext_t` that live as
    // long as the handler runs; nothing else refers to them.
    unsafe {
        let frame = &mut *context.cast::<libc::ucontext_t>();
        let address = (*info).si_addr() as usize;
        if processor::leave_copy(frame, address) {
            return;
        }
        let errno = libc::__errno_location();
        let before = *errno;
        let touch = Touch { address, stores: processor::stores(frame) };
        let outcome = if is_fault(info) { fault_ranges::resolve(touch) } else { None };
        match outcome {
            Some(Touched::Again) => {}
            Some(Touched::Segv) => {
                // Delivered when this handler returns. Where it cannot be, the store is the
                // SIGBUS that it came as, or the thread would store forever.
                let thread = libc::gettid().cast_unsigned();
                if blocks_segv(frame) || send_segv(thread, address as u64).is_err() {
                    unblock(frame, signal);
                    chain(signal, info, context);
                }
            }
            Some(Touched::Bus) | None => {
                if outcome.is_none() && is_fault(info) {
                    fault_ranges::explain(touch);
                }
                unblock(frame, signal);
                chain(signal, info, context);
            }
        }
        *errno = before;
    }
}

/// Whether the thread that was interrupted blocks SIGSEGV.
fn blocks_segv(frame: &libc::ucontext_t) -> bool {
    // SAFETY: the set was the kernel's.
    unsafe { libc::sigismember(&raw const frame.uc_sigmask, libc::SIGSEGV) == 1 }
}

/// Lets through what the thread lets through, but for the signal itself, as the kernel
/// does for a handler without a mask.
///
/// # Safety
/// In a signal handler.
unsafe fn unblock(frame: &libc::ucontext_t, signal: i32) {
    // SAFETY: the kernel's set is the first eight bytes of the frame's; sigset_t is plain data.
    unsafe {
        let mut mask = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
        ptr::copy_nonoverlapping(
            (&raw const frame.uc_sigmask).cast::<u8>(),
            (&raw mut mask).cast::<u8>(),
            size_of::<u64>(),
        );
        libc::sigaddset(&raw mut mask, signal);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, ptr::null_mut());
    }
}

/// What the handler reads in a processor's registers.
#[cfg(target_arch = "x86_64")]
mod processor {
    use super::super::copy::fixup;

    const R8: usize = libc::REG_R8.unsigned_abs() as usize;
    const R9: usize = libc::REG_R9.unsigned_abs() as usize;
    const RIP: usize = libc::REG_RIP.unsigned_abs() as usize;
    const ERR: usize = libc::REG_ERR.unsigned_abs() as usize;
    /// In a page fault's error code: it was a store.
    const STORE: i64 = 2;

    /// Has a copy that faulted on its source end with an error; false if none did.
    #[expect(clippy::cast_sign_loss, clippy::cast_possible_wrap, reason = "registers")]
    pub(super) fn leave_copy(frame: &mut libc::ucontext_t, address: usize) -> bool {
        let registers = &mut frame.uc_mcontext.gregs;
        let source = registers[R8] as usize..registers[R9] as usize;
        let Some(fixup) = fixup(registers[RIP] as usize) else { return false };
        let lost = source.contains(&address);
        if lost {
            registers[RIP] = fixup as i64;
        }
        lost
    }

    /// Whether the instruction that faulted stores.
    pub(super) fn stores(frame: &libc::ucontext_t) -> bool {
        frame.uc_mcontext.gregs[ERR] & STORE != 0
    }
}

/// What the handler reads in a processor's registers.
#[cfg(target_arch = "aarch64")]
mod processor {
    /// The record of the frame that has the exception's syndrome (`ESR_MAGIC`).
    const ESR_MAGIC: u32 = 0x4553_5201;
    /// In the syndrome of a data abort: it was a store.
    const STORE: u64 = 1 << 6;
    /// Bytes of records in a frame, and how they are aligned.
    const RECORDS_BYTES: usize = 4096;
    const RECORDS_ALIGN: usize = 16;

    /// There is no copying routine here.
    pub(super) fn leave_copy(_frame: &mut libc::ucontext_t, _address: usize) -> bool {
        false
    }

    /// Whether the instruction that faulted stores.
    pub(super) fn stores(frame: &libc::ucontext_t) -> bool {
        let context = &raw const frame.uc_mcontext;
        // SAFETY: records lie behind the registers, each with its magic number and its
        // length in front, and end with one of length zero.
        unsafe {
            let registers_end = (&raw const (*context).pstate).add(1).cast::<u8>();
            let mut at = registers_end.add(registers_end.align_offset(RECORDS_ALIGN));
            let end = at.add(RECORDS_BYTES);
            while at < end {
                let [magic, len] = at.cast::<[u32; 2]>().read_unaligned();
                if len == 0 {
                    return false;
                }
                if magic == ESR_MAGIC {
                    return at.add(8).cast::<u64>().read_unaligned() & STORE != 0;
                }
                at = at.add(len as usize);
            }
            false
        }
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
