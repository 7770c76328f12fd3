//! Opening stores, and what is refused.

mod numbered;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use fremap_core::error::{Error, Uninterruptible};
use fremap_core::store::{OpenMode, Store, StoreKind};
use fremap_core::sys::span::Span;
use numbered::{assert_pages, list, numbered, read, Scratch};
use rustix::io::Errno;

const PAGE: usize = 4096;

fn open_error(path: &Path, mode: OpenMode) -> Error {
    Store::open(path, mode, None, false).expect_err("refused")
}

fn assert_errno(error: &Error, expected: Errno) {
    match error {
        Error::Io { errno, .. } => assert_eq!(*errno, expected),
        other => panic!("expected {expected:?}, got {other:?}"),
    }
}

#[test]
fn what_has_no_pages_is_refused() {
    let missing = Scratch::new();
    assert_errno(&open_error(missing.path(), OpenMode::Read), Errno::NOENT);
    assert_errno(&open_error(&std::env::temp_dir(), OpenMode::Read), Errno::ISDIR);
    assert_errno(&open_error(&std::env::temp_dir(), OpenMode::ReadWrite), Errno::ISDIR);
    assert!(matches!(open_error(Path::new("/dev/null"), OpenMode::Read), Error::Argument(_)));
    let (pipe, _writer) = std::io::pipe().expect("pipe");
    let error = Store::from_fd(pipe.into(), false, None, false).expect_err("refused");
    assert!(error.to_string().contains("pipe"), "{error}");
    let socket = Scratch::new();
    let _listener = std::os::unix::net::UnixListener::bind(socket.path()).expect("bound");
    let error = open_error(socket.path(), OpenMode::Read);
    assert!(error.to_string().contains("socket"), "{error}");
}

#[test]
fn page_sizes_are_checked() {
    let file = numbered(PAGE, PAGE);
    for bytes in [0, 1, 1000, 2048, 5000, 12_288, 1 << 31] {
        let error = Store::open(file.path(), OpenMode::Read, Some(bytes), false);
        assert!(matches!(error, Err(Error::Argument(_))), "{bytes}");
    }
    let store = Store::open(file.path(), OpenMode::Read, Some(1 << 30), false).expect("opened");
    assert_eq!((store.page_count(), store.size_bytes()), (1, PAGE as u64));
    let (bytes, outcome) = read(&store, &[0]);
    outcome.expect("read");
    assert_pages(&bytes[..PAGE], &[0], PAGE, PAGE as u64);
    let zeros = vec![0; 1 << 20];
    assert!(bytes[PAGE..].chunks(zeros.len()).all(|found| found == &zeros[..found.len()]));
}

#[test]
fn an_empty_file_has_no_page() {
    let file = numbered(0, PAGE);
    let store = Store::open(file.path(), OpenMode::Read, None, false).expect("opened");
    assert_eq!(store.page_count(), 0);
    assert_eq!(store.resident(&list(&[])).expect("told"), Vec::<bool>::new());
    assert!(matches!(read(&store, &[0]).1, Err(Error::Truncated { .. })));
    assert!(matches!(read(&store, &[0, 1]).1, Err(Error::Truncated { completed: 0, .. })));
}

#[test]
fn descriptors_are_taken_as_they_are() {
    let file = numbered(3 * PAGE, PAGE);
    let reading = || OwnedFd::from(File::open(file.path()).expect("opened"));
    let store = Store::from_fd(reading(), false, None, false).expect("opened");
    assert_eq!(store.kind(), StoreKind::File);
    assert_eq!(store.path(), Some(file.path()));
    assert_pages(&read(&store, &[2, 0]).0, &[2, 0], PAGE, 3 * PAGE as u64);
    assert_errno(&Store::from_fd(reading(), true, None, false).expect_err("refused"), Errno::BADF);
    let writing = File::options().write(true).open(file.path()).expect("opened");
    let error = Store::from_fd(writing.into(), true, None, false).expect_err("refused");
    assert_errno(&error, Errno::BADF);
    let both = File::options().read(true).append(true).open(file.path()).expect("opened");
    let error = Store::from_fd(both.into(), true, None, false).expect_err("refused");
    assert!(error.to_string().contains("O_APPEND"), "{error}");
    let direct = Store::from_fd(reading(), false, None, true).expect("opened");
    assert_pages(&read(&direct, &[2, 0]).0, &[2, 0], PAGE, 3 * PAGE as u64);
}

#[test]
fn shared_memory_by_name() {
    let name = format!("fremap-test-{}", std::process::id());
    let missing = Store::shared_memory(&name, None, false, None).expect_err("not there");
    assert_errno(&missing, Errno::NOENT);
    assert!(matches!(Store::shared_memory(&name, None, true, None), Err(Error::Argument(_))));
    let made = Store::shared_memory(&name, Some(8192), true, None).expect("made");
    let again = Store::shared_memory(&name, Some(8192), true, None).expect_err("there");
    assert_errno(&again, Errno::EXIST);
    let other = Store::shared_memory(&name, Some(4096), false, None).expect_err("another size");
    assert!(matches!(other, Error::Argument(_)));
    let attached = Store::shared_memory(&name, None, false, None).expect("attached");
    assert_eq!((attached.kind(), attached.page_count()), (StoreKind::Memory, 2));
    let mut page = numbered::page_content(1, PAGE);
    made.write(&list(&[1]), Span::of(&mut page), &Uninterruptible).expect("written");
    assert_pages(&read(&attached, &[1]).0, &[1], PAGE, 8192);
    Store::unlink_shared_memory(&name).expect("unlinked");
    assert_errno(&Store::unlink_shared_memory(&name).expect_err("gone"), Errno::NOENT);
    for bad in ["", "/", "a/b", "..", "a\0b"] {
        assert!(matches!(Store::unlink_shared_memory(bad), Err(Error::Argument(_))), "{bad:?}");
    }
}
