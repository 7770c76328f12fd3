use std::fs;
use std::path::{Path, PathBuf};

use super::{available_below, unescape};

const MIB: u64 = 1 << 20;
const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
const V1: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                  36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n";
const V2_BESIDE: &str = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

/// A tree of files that is removed at last.
struct Tree(PathBuf);

impl Drop for Tree {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("it was made");
    }
}

impl Tree {
    /// A machine that has 1000 MiB available.
    fn new(name: &str, membership: &str, mounts: &str) -> Self {
        let root = std::env::temp_dir()
            .join(format!("fremap-limits-{}-{name}", crate::sys::process::id()));
        let tree = Self(root);
        tree.file("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    1024000 kB\nBuffers: 1 kB\n");
        tree.file("proc/self/cgroup", membership);
        tree.file("proc/self/mountinfo", mounts);
        tree
    }

    fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("a file")).expect("a directory");
        fs::write(path, text).expect("a file");
        self
    }

    /// A group of version 2, all in MiB: limit, soft limit, usage, and page cache of that.
    fn v2(&self, group: &str, max: &str, high: &str, current: u64, cached: u64) -> &Self {
        let bytes = |text: &str| {
            text.parse::<u64>().map_or_else(|_| text.to_owned(), |mib| (mib * MIB).to_string())
        };
        let half = cached * MIB / 2;
        let stat = format!("anon 5\nfile 7\ninactive_file {half}\nactive_file {half}\n");
        self.file(&format!("{group}/memory.max"), &(bytes(max) + "\n"))
            .file(&format!("{group}/memory.high"), &(bytes(high) + "\n"))
            .file(&format!("{group}/memory.current"), &format!("{}\n", current * MIB))
            .file(&format!("{group}/memory.stat"), &stat)
    }

    /// The same of version 1.
    fn v1(&self, group: &str, limit: u64, usage: u64, cached: u64, hierarchical: u64) -> &Self {
        let stat = format!(
            "cache 1\ninactive_file 1\nhierarchical_memory_limit {hierarchical}\n\
             total_inactive_file {}\ntotal_active_file 0\n",
            cached * MIB
        );
        self.file(&format!("{group}/memory.limit_in_bytes"), &format!("{limit}\n"))
            .file(&format!("{group}/memory.usage_in_bytes"), &format!("{}\n", usage * MIB))
            .file(&format!("{group}/memory.stat"), &stat)
    }

    fn left_mib(&self) -> u64 {
        available_below(Path::new(&self.0)).expect("a machine") / MIB
    }
}

const NO_LIMIT: u64 = 9_223_372_036_854_771_712;

#[test]
fn without_limits_the_machine_says_it() {
    let tree = Tree::new("none", "0::/\n", V2);
    assert_eq!(tree.left_mib(), 1000);
    let tree = Tree::new("max", "0::/a\n", V2);
    tree.v2("sys/fs/cgroup/a", "max", "max", 900, 0);
    assert_eq!(tree.left_mib(), 1000);
    let tree = Tree::new("empty", "", "");
    assert_eq!(tree.left_mib(), 1000);
}

#[test]
fn every_ancestor_and_both_limits_of_version_2_count() {
    let tree = Tree::new("v2", "0::/a/b/c\n", V2);
    tree.v2("sys/fs/cgroup/a/b/c", "max", "max", 10, 0);
    tree.v2("sys/fs/cgroup/a/b", "800", "max", 100, 0);
    assert_eq!(tree.left_mib(), 700);
    tree.v2("sys/fs/cgroup/a", "max", "400", 150, 0);
    assert_eq!(tree.left_mib(), 250);
    tree.v2("sys/fs/cgroup/other", "1", "1", 1, 0);
    assert_eq!(tree.left_mib(), 250);
}

#[test]
fn page_cache_is_not_taken() {
    let tree = Tree::new("cache", "0::/a\n", V2);
    tree.v2("sys/fs/cgroup/a", "300", "max", 300, 280);
    assert_eq!(tree.left_mib(), 280);
}

#[test]
fn version_1_and_hybrid_trees_count() {
    let membership = "9:name=systemd:/\n4:cpu,memory:/box/me\n1:cpu:/\n0::/\n";
    let tree = Tree::new("v1", membership, &(V1.to_owned() + V2_BESIDE));
    tree.v1("sys/fs/cgroup/memory/box/me", NO_LIMIT, 50, 0, NO_LIMIT);
    assert_eq!(tree.left_mib(), 1000);
    tree.v1("sys/fs/cgroup/memory/box", 500 * MIB, 120, 20, NO_LIMIT);
    assert_eq!(tree.left_mib(), 400);
    // One that does not count what its children take limits none of them.
    tree.file("sys/fs/cgroup/memory/box/memory.use_hierarchy", "0\n");
    assert_eq!(tree.left_mib(), 1000);
}

#[test]
fn version_1_tells_of_ancestors_that_cannot_be_seen() {
    let mounts = "35 31 0:32 /box/me /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
    let tree = Tree::new("hidden", "4:memory:/box/me\n", mounts);
    tree.v1("sys/fs/cgroup/memory", NO_LIMIT, 60, 10, 300 * MIB);
    assert_eq!(tree.left_mib(), 250);
}

#[test]
fn the_mount_of_a_container_shows_its_group() {
    // A bind mount of the group, and the path as the host has it.
    let mounts = "30 23 0:26 /kube/pod /sys/fs/my\\040groups ro - cgroup2 cgroup2 rw\n";
    let tree = Tree::new("bind", "0::/kube/pod/main\n", mounts);
    tree.v2("sys/fs/my groups/main", "max", "max", 10, 0);
    tree.v2("sys/fs/my groups", "200", "max", 50, 0);
    assert_eq!(tree.left_mib(), 150);
    // A namespace in which the group lies outside.
    let mounts = "30 23 0:26 /.. /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
    let tree = Tree::new("outside", "0::/../other\n", mounts);
    tree.v2("sys/fs/cgroup", "90", "max", 50, 0);
    assert_eq!(tree.left_mib(), 40);
}

#[test]
fn a_group_over_its_limit_leaves_nothing() {
    let tree = Tree::new("over", "0::/a\n", V2);
    tree.v2("sys/fs/cgroup/a", "100", "max", 130, 2);
    assert_eq!(tree.left_mib(), 0);
    // Without its usage nothing is known.
    let tree = Tree::new("unknown", "0::/a\n", V2);
    tree.file("sys/fs/cgroup/a/memory.max", "1000\n");
    assert_eq!(tree.left_mib(), 1000);
}

#[test]
fn names_are_unescaped() {
    assert_eq!(unescape("a\\040b\\011c"), "a b\tc");
    assert_eq!(unescape("a\\b"), "a\\b");
}
