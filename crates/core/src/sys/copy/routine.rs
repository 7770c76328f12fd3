//! The copying routine and the way out of it.

use std::arch::global_asm;

use super::super::span::Span;
use super::SourceLost;

// Both routines keep the bounds of their source in r8 and r9 for the handler,
// and never touch the stack, so that the way out may return from any of their
// instructions.
global_asm!(
    ".pushsection .text.fremap_copy,\"ax\",@progbits",
    ".p2align 6",
    ".hidden fremap_copy_start",
    ".globl fremap_copy_start",
    "fremap_copy_start:",
    // (rdi: into, rsi: from, rdx: bytes, rcx: next) -> eax
    ".hidden fremap_copy_lines",
    ".globl fremap_copy_lines",
    ".type fremap_copy_lines,@function",
    "fremap_copy_lines:",
    ".cfi_startproc",
    "mov r8, rsi",
    "lea r9, [rsi + rdx]",
    ".p2align 4",
    "2:",
    "prefetcht0 [rcx]",
    "movdqu xmm0, [rsi]",
    "movdqu xmm1, [rsi + 16]",
    "movdqu xmm2, [rsi + 32]",
    "movdqu xmm3, [rsi + 48]",
    "movntdq [rdi], xmm0",
    "movntdq [rdi + 16], xmm1",
    "movntdq [rdi + 32], xmm2",
    "movntdq [rdi + 48], xmm3",
    "add rcx, 64",
    "add rdi, 64",
    "add rsi, 64",
    "cmp rsi, r9",
    "jb 2b",
    "xor eax, eax",
    "ret",
    ".cfi_endproc",
    ".size fremap_copy_lines, . - fremap_copy_lines",
    ".hidden fremap_copy_bytes",
    ".globl fremap_copy_bytes",
    ".type fremap_copy_bytes,@function",
    "fremap_copy_bytes:",
    ".cfi_startproc",
    "mov r8, rsi",
    "lea r9, [rsi + rdx]",
    "mov rcx, rdx",
    "rep movsb",
    "xor eax, eax",
    "ret",
    ".cfi_endproc",
    ".size fremap_copy_bytes, . - fremap_copy_bytes",
    ".hidden fremap_copy_end",
    ".globl fremap_copy_end",
    "fremap_copy_end:",
    ".hidden fremap_copy_lost",
    ".globl fremap_copy_lost",
    "fremap_copy_lost:",
    "mov eax, 1",
    "ret",
    ".popsection",
);

extern "C" {
    fn fremap_copy_start();
    fn fremap_copy_lines(into: *mut u8, from: *const u8, bytes: usize, next: *const u8) -> i32;
    fn fremap_copy_bytes(into: *mut u8, from: *const u8, bytes: usize) -> i32;
    fn fremap_copy_end();
    fn fremap_copy_lost();
}

/// What one turn of the routine's loop copies.
const LINE_BYTES: usize = 64;
/// The alignment that stores past the caches need.
const STORE_ALIGN: usize = 16;

pub(super) fn copy(
    into: Span<'_>,
    from: Span<'_>,
    next: Option<Span<'_>>,
) -> Result<(), SourceLost> {
    let bytes = from.len();
    if bytes == 0 {
        return Ok(());
    }
    // Fetching the source itself again costs nothing; any address may be fetched.
    let next = next.map_or(from.start(), Span::start);
    let lines = bytes.is_multiple_of(LINE_BYTES) && into.start().align_offset(STORE_ALIGN) == 0;
    // SAFETY: both spans are mapped for the length given; a source that the
    // kernel cannot bring raises SIGBUS, which `signal` turns into a return
    // of 1. Lines are only copied in whole ones, to an aligned address.
    let lost = unsafe {
        if lines {
            fremap_copy_lines(into.start(), from.start(), bytes, next)
        } else {
            fremap_copy_bytes(into.start(), from.start(), bytes)
        }
    };
    if lost == 0 {
        Ok(())
    } else {
        Err(SourceLost)
    }
}

pub(super) fn fence() {
    // SAFETY: every x86-64 has SSE.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// Where a thread goes on that faulted at an instruction, if that is one of the routine's.
pub(in crate::sys) fn way_out(instruction: usize) -> Option<usize> {
    let within = fremap_copy_start as *const () as usize..fremap_copy_end as *const () as usize;
    within.contains(&instruction).then_some(fremap_copy_lost as *const () as usize)
}
