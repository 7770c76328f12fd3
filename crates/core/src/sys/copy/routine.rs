//! The copy routine and its fixup.

use std::arch::global_asm;

use super::super::span::Span;
use super::SourceLost;

// The routines keep the bounds of their source in r8 and r9 for the handler, and
// how many rows are done in r10 for the way out. They never touch the stack, so
// that the way out may return from any of their instructions.
global_asm!(
    ".pushsection .text.fremap_copy,\"ax\",@progbits",
    ".macro fremap_label name",
    ".hidden \\name",
    ".globl \\name",
    "\\name:",
    ".endm",
    ".macro fremap_begin name",
    ".type \\name,@function",
    "fremap_label \\name",
    ".cfi_startproc",
    "xor r10d, r10d",
    ".endm",
    ".macro fremap_end name",
    "xor eax, eax",
    "ret",
    ".cfi_endproc",
    ".size \\name, . - \\name",
    ".endm",
    // (rdi: into, rsi: from, rdx: bytes, rcx: next) -> eax
    ".macro fremap_copy_by store, name",
    "fremap_begin \\name",
    "mov r8, rsi",
    "lea r9, [rsi + rdx]",
    ".p2align 4",
    "2:",
    "prefetcht0 [rcx]",
    "movdqu xmm0, [rsi]",
    "movdqu xmm1, [rsi + 16]",
    "movdqu xmm2, [rsi + 32]",
    "movdqu xmm3, [rsi + 48]",
    "\\store [rdi], xmm0",
    "\\store [rdi + 16], xmm1",
    "\\store [rdi + 32], xmm2",
    "\\store [rdi + 48], xmm3",
    "add rcx, 64",
    "add rdi, 64",
    "add rsi, 64",
    "cmp rsi, r9",
    "jb 2b",
    "fremap_end \\name",
    ".endm",
    ".p2align 6",
    "fremap_label fremap_copy_start",
    "fremap_copy_by movntdq, fremap_copy_lines",
    // What is copied stays in the caches.
    "fremap_copy_by movdqa, fremap_copy_cached",
    "fremap_begin fremap_copy_bytes",
    "mov r8, rsi",
    "lea r9, [rsi + rdx]",
    "mov rcx, rdx",
    "rep movsb",
    "fremap_end fremap_copy_bytes",
    // (rdi: addresses of rows, rsi: how many, rdx: bytes of each, rcx: into) -> rax
    "fremap_begin fremap_copy_rows",
    "mov r11, rdi",
    "mov rax, rcx",
    ".p2align 4",
    // Fetches a row that comes later, every line of it.
    "2:",
    "mov rcx, [r11 + {ahead}]",
    "lea rdi, [rcx + rdx]",
    "3:",
    "prefetcht0 [rcx]",
    "add rcx, 64",
    "cmp rcx, rdi",
    "jb 3b",
    "prefetcht0 [rdi - 1]",
    "mov r8, [r11]",
    "lea r9, [r8 + rdx]",
    "mov rcx, r8",
    "cmp rdx, 16",
    "jb 6f",
    // 32 bytes a turn, then 16, then the last 16, some of them for a second time.
    "lea rdi, [rcx + 32]",
    "cmp rdi, r9",
    "ja 5f",
    "4:",
    "movdqu xmm0, [rcx]",
    "movdqu xmm1, [rcx + 16]",
    "movdqu [rax], xmm0",
    "movdqu [rax + 16], xmm1",
    "mov rcx, rdi",
    "add rax, 32",
    "add rdi, 32",
    "cmp rdi, r9",
    "jbe 4b",
    "5:",
    "mov rdi, r9",
    "sub rdi, rcx",
    "jz 8f",
    "cmp rdi, 16",
    "jb 10f",
    "movdqu xmm0, [rcx]",
    "movdqu [rax], xmm0",
    "10:",
    "movdqu xmm0, [r9 - 16]",
    "movdqu [rax + rdi - 16], xmm0",
    "add rax, rdi",
    "jmp 8f",
    // Rows of less than 16 bytes: two words that may overlap, or one byte.
    "6:",
    "cmp rdx, 8",
    "jb 7f",
    "mov rdi, [rcx]",
    "mov rcx, [r9 - 8]",
    "mov [rax], rdi",
    "mov [rax + rdx - 8], rcx",
    "jmp 12f",
    "7:",
    "cmp rdx, 4",
    "jb 11f",
    "mov edi, [rcx]",
    "mov ecx, [r9 - 4]",
    "mov [rax], edi",
    "mov [rax + rdx - 4], ecx",
    "jmp 12f",
    "11:",
    "movzx edi, byte ptr [rcx]",
    "mov [rax], dil",
    "cmp rdx, 1",
    "je 12f",
    "movzx edi, word ptr [r9 - 2]",
    "mov [rax + rdx - 2], di",
    "12:",
    "add rax, rdx",
    "8:",
    "inc r10",
    "add r11, 8",
    "cmp r10, rsi",
    "jb 2b",
    "fremap_end fremap_copy_rows",
    "fremap_label fremap_copy_end",
    "fremap_label fremap_copy_lost",
    "lea rax, [r10 + 1]",
    "ret",
    ".popsection",
    ahead = const ROWS_AHEAD * size_of::<*mut u8>(),
);

/// How many rows ahead of its copy a row is fetched.
const ROWS_AHEAD: usize = 16;
/// The longest rows that are fetched so: longer ones are copied one by one, each
/// fetching the next.
const MAX_FETCHED_BYTES: usize = 2048;

/// Copies `rows` of `row_bytes` bytes, at least one, one after another into `into`; an
/// error says how many were copied before the one whose source was lost.
///
/// # Safety
/// Each address is that of so many bytes, which stay mapped.
pub(super) unsafe fn copy_rows(
    rows: &mut Vec<*mut u8>,
    row_bytes: usize,
    into: Span<'_>,
) -> Result<(), usize> {
    let count = rows.len();
    assert_eq!(into.len(), count * row_bytes, "memory for as many rows");
    let Some(&end) = rows.last() else { return Ok(()) };
    if row_bytes > MAX_FETCHED_BYTES {
        // SAFETY: as promised.
        let row = |number: &usize| unsafe { Span::new(rows[*number], row_bytes) };
        for number in 0..count {
            let next = Some(number + 1).filter(|&next| next < count).as_ref().map(row);
            copy(into.part(number * row_bytes, row_bytes), row(&number), next, false)
                .map_err(|SourceLost| number)?;
        }
        return Ok(());
    }
    // What is fetched ahead of the last rows: any address may be.
    rows.resize(count + ROWS_AHEAD, end);
    // SAFETY: rows are mapped for their length, by the caller's promise; a source that
    // the kernel cannot bring raises SIGBUS, which `handler` turns into a return of the
    // row's number and one. There are as many rows behind the last as are fetched ahead.
    let outcome = unsafe { fremap_copy_rows(rows.as_ptr(), count, row_bytes, into.start()) };
    rows.truncate(count);
    if outcome == 0 {
        Ok(())
    } else {
        Err(outcome - 1)
    }
}

extern "C" {
    fn fremap_copy_start();
    fn fremap_copy_lines(into: *mut u8, from: *const u8, bytes: usize, next: *const u8) -> i32;
    fn fremap_copy_cached(into: *mut u8, from: *const u8, bytes: usize, next: *const u8) -> i32;
    fn fremap_copy_bytes(into: *mut u8, from: *const u8, bytes: usize) -> i32;
    fn fremap_copy_rows(
        from: *const *mut u8,
        count: usize,
        row_bytes: usize,
        into: *mut u8,
    ) -> usize;
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
    keep_cached: bool,
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
        if lines && keep_cached {
            fremap_copy_cached(into.start(), from.start(), bytes, next)
        } else if lines {
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

/// The same of any length and alignment: past the caches but for both ends. Nothing is fetched
/// ahead, as the processor sees by itself that a long copy goes on.
pub(super) fn copy_long(into: Span<'_>, from: Span<'_>) -> Result<(), SourceLost> {
    let head = into.start().align_offset(STORE_ALIGN).min(from.len());
    let lines = (from.len() - head) / LINE_BYTES * LINE_BYTES;
    let end = head + lines;
    for (start, end) in [(0, head), (head, end), (end, from.len())] {
        copy(into.part(start, end - start), from.part(start, end - start), None, false)?;
    }
    Ok(())
}

pub(super) fn fence() {
    // SAFETY: every x86-64 has SSE.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// Where a thread goes on that faulted at an instruction, if that is one of the routine's.
pub(in crate::sys) fn fixup(instruction: usize) -> Option<usize> {
    let within = fremap_copy_start as *const () as usize..fremap_copy_end as *const () as usize;
    within.contains(&instruction).then_some(fremap_copy_lost as *const () as usize)
}
