//! How much memory this process may still use: `MemAvailable`, or less if a limit of its memory
//! cgroups leaves less (version 1, version 2, or both at once).
//!
//! Page cache of a cgroup does not count as used, because the kernel reclaims it before it kills.

use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;

/// The memory that this process may still have, in bytes: the least of what the machine has
/// available and what each memory cgroup above the process leaves.
///
/// # Errors
/// ENOENT where `/proc` is not mounted, ENODATA without `MemAvailable`.
pub fn available() -> Result<u64, Errno> {
    available_below(Path::new("/"))
}

/// The same, with all files looked up below `root`.
fn available_below(root: &Path) -> Result<u64, Errno> {
    let read = |path: &str| {
        std::fs::read_to_string(root.join(path))
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    let meminfo = read("proc/meminfo")?;
    let machine = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .ok_or(Errno::NODATA)?
        .saturating_mul(1024);
    // A kernel without cgroups has neither file, and limits nothing.
    let (Ok(membership), Ok(mounts)) = (read("proc/self/cgroup"), read("proc/self/mountinfo"))
    else {
        return Ok(machine);
    };
    let left = groups(&membership, &mounts).into_iter().filter_map(|group| left(root, &group));
    Ok(left.fold(machine, u64::min))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// The group of this process in one hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    version: Version,
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The group, below the mount.
    below: PathBuf,
}

/// A mount as a line of `mountinfo` tells it.
struct Mount {
    version: Version,
    /// The group that the mount point shows.
    root: String,
    point: String,
}

/// `mountinfo` writes spaces and the like in octal.
fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match digits {
            Some(byte) if byte.is_ascii() => {
                text.push(char::from(byte));
                text.push_str(&part[3..]);
            }
            _ => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

fn mount(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(3);
    let (root, point) = (unescape(front.next()?), unescape(front.next()?));
    let mut back = back.split(' ');
    let version = match back.next()? {
        "cgroup2" => Version::V2,
        "cgroup" if back.nth(1)?.split(',').any(|option| option == "memory") => Version::V1,
        _ => return None,
    };
    Some(Mount { version, root, point })
}

/// The path of `path` below `root`, if it lies there and neither is outside of the cgroup
/// namespace (where the kernel writes "..").
fn below(path: &str, root: &str) -> Option<PathBuf> {
    let below = Path::new(path).strip_prefix(root).ok()?;
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| below.to_path_buf())
}

/// The groups whose limits hold for this process, from `/proc/self/cgroup` and
/// `/proc/self/mountinfo`.
fn groups(membership: &str, mounts: &str) -> Vec<Group> {
    let path_of = |version| {
        membership.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let ours = match version {
                Version::V2 => number == "0" && controllers.is_empty(),
                Version::V1 => controllers.split(',').any(|name| name == "memory"),
            };
            ours.then_some(path)
        })
    };
    let mounts: Vec<Mount> = mounts.lines().filter_map(mount).collect();
    let mut groups = Vec::new();
    for version in [Version::V2, Version::V1] {
        let Some(path) = path_of(version) else { continue };
        let all = || mounts.iter().filter(|mount| mount.version == version);
        // The mount that shows the most ancestors has the shortest root.
        let found = all()
            .filter_map(|mount| Some((mount, below(path, &mount.root)?)))
            .min_by_key(|(mount, _)| mount.root.len())
            // The process is elsewhere as far as the mount tells: what can be seen of the
            // hierarchy is the top of the mount.
            .or_else(|| all().next().map(|mount| (mount, PathBuf::new())));
        groups.extend(found.map(|(mount, below)| Group {
            version,
            mount: PathBuf::from(&mount.point),
            below,
        }));
    }
    groups
}

/// The sum of some fields of a `memory.stat`.
fn sum_of(stat: &str, names: &[&str]) -> u64 {
    let value = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        names.contains(&name).then(|| value.trim().parse::<u64>().ok())?
    };
    stat.lines().filter_map(value).fold(0, u64::saturating_add)
}

/// What the limits of a group and of its ancestors leave; none where there is no limit.
fn left(root: &Path, group: &Group) -> Option<u64> {
    let (limits, usage, reclaimable): (&[&str], _, &[&str]) = match group.version {
        Version::V2 => (
            &["memory.max", "memory.high"],
            "memory.current",
            &["inactive_file", "active_file", "slab_reclaimable"],
        ),
        Version::V1 => (
            &["memory.limit_in_bytes"],
            "memory.usage_in_bytes",
            &["total_inactive_file", "total_active_file"],
        ),
    };
    let mount = root.join(group.mount.strip_prefix("/").unwrap_or(&group.mount));
    let mut least: Option<u64> = None;
    for ancestor in group.below.ancestors() {
        let directory = mount.join(ancestor);
        let text = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
        let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
        if ancestor != group.below && number("memory.use_hierarchy") == Some(0) {
            // Version 1: this one does not count what its children take, nor limits them.
            break;
        }
        let stat = text("memory.stat").unwrap_or_default();
        // Version 1 tells of the limits of ancestors that the mount does not show.
        let inherited = sum_of(&stat, &["hierarchical_memory_limit"]);
        let inherited = Some(inherited).filter(|&limit| limit > 0);
        // "max" is no number, and no limit.
        let limit = limits.iter().filter_map(|name| number(name)).chain(inherited).min();
        if let (Some(limit), Some(used)) = (limit, number(usage)) {
            let taken = used.saturating_sub(sum_of(&stat, reclaimable));
            let left = limit.saturating_sub(taken);
            least = Some(least.map_or(left, |least| least.min(left)));
        }
    }
    least
}

#[cfg(test)]
mod tests;
