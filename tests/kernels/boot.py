"""Run fremap on other kernels: `python tests/kernels/boot.py [SUITE ...]` (`make kernels`).

Each suite of Debian has a kernel. It is downloaded and unpacked, not installed, and booted in QEMU:
emulated, or ten times as fast by KVM (ACCEL=kvm). The guest's
root is this machine's, read-only over 9p, under a layer that is kept in memory; so it runs the
environment in `.venv`. There `guest.sh` runs the self-test and a part of the tests, as root and as
an ordinary user. `arm64:SUITE` boots a kernel for aarch64, always emulated, on a small Debian with
the wheel in `dist/` (`make wheels`), and runs the self-test alone.

The results go into the table of docs/kernels.md. Needs qemu-system-x86 (qemu-system-arm and
mmdebstrap for arm64), busybox-static, kmod, cpio, e2fsprogs, xz-utils and zstd.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/kernels.md"
CACHE = REPOSITORY / "target/kernels"
SUITES = ("bullseye", "bookworm", "trixie", "sid")
MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "overlay", "ext4")
LONGEST_SECONDS = 1500
# Not tried by itself: inside some virtual machines /dev/kvm is there and guests hang.
ACCELERATED = os.environ.get("ACCEL") == "kvm"
SHARED = "security_model=none,readonly=on,multidevs=remap"
BEGIN, END = "<!-- runs: begin -->\n", "<!-- runs: end -->\n"
STEPS = ("selftest-root", "tests-root", "selftest-user", "tests-user")

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 host /lower
$b mount -t tmpfs -o size=60% tmpfs /upper; $b mkdir /upper/u /upper/w
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w overlay /new
$b mkdir -p /new/proc /new/sys /new/dev /new/tmp /new/scratch; $b cp /command /new/command
$b mount -t ext4 /dev/vda /new/scratch; $b chmod 1777 /new/scratch
for folder in proc sys dev; do $b mount --move /$folder /new/$folder; done
$b mkdir -p /new/dev/shm /new/dev/pts
$b mount -t tmpfs tmpfs /new/dev/shm; $b mount -t devpts devpts /new/dev/pts
$b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
$b ln -s /proc/self/fd /new/dev/fd; $b ip link set lo up
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 TMPDIR=/scratch
$b chroot /new /bin/sh /command </new/dev/null
$b sync; echo o >/new/proc/sysrq-trigger; $b sleep 9
"""


@dataclass(frozen=True)
class Kernel:
    """A kernel that is unpacked: its image, its modules, and where they come from."""

    version: str
    image: Path
    folder: Path
    suite: str
    arch: str


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a program; return what it printed, or end with that."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}")
    return done.stdout


def apt(program: str, suite: str, arch: str, mirror: str) -> list[str]:
    """Return the start of an apt command that knows one suite alone, and not this machine's."""
    state = CACHE / f"apt-{suite}-{arch}"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (state / "sources").write_text(f"deb [signed-by={key}] {mirror} {suite} main\n")
    settings = {
        "Dir::Etc::sourcelist": state / "sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "APT::Architecture": arch,
        "APT::Architectures": arch,
        "APT::Sandbox::User": "root",
    }
    return [program, "-q", *(f"-o{name}={value}" for name, value in settings.items())]


def unpacked(suite: str, arch: str, mirror: str) -> Kernel:
    """Download and unpack the kernel of a suite, unless it was before."""
    run(*apt("apt-get", suite, arch, mirror), "update")
    listed = run(*apt("apt-cache", suite, arch, mirror), "depends", f"linux-image-{arch}")
    package = re.findall(r"Depends: (linux-image-\S+)", listed)[0]
    version = package.removeprefix("linux-image-")
    folder = CACHE / package
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # From 7.x on a kernel is several packages, all with its version in their names.
        needed = run(*apt("apt-cache", suite, arch, mirror), "depends", package)
        packages = {package, *re.findall(rf"Depends: (\S*{re.escape(version)}\S*)", needed)}
        run(*apt("apt-get", suite, arch, mirror), "download", *sorted(packages), cwd=folder)
        for archive in folder.glob("*.deb"):
            run("dpkg-deb", "-x", archive, folder)
            archive.unlink()
        if not (folder / "lib").exists():
            (folder / "lib").symlink_to("usr/lib")
        run("depmod", "-b", folder, version)
        (folder / "done").touch()
    places = (folder / f"boot/vmlinuz-{version}", folder / f"lib/modules/{version}/vmlinuz")
    image = next(place for place in places if place.exists())
    return Kernel(version, image, folder, suite, arch)


def write_initrd(kernel: Kernel, busybox: Path, command: str, folder: Path) -> Path:
    """Make the first file system of the guest: busybox, the modules, what to run."""
    root = folder / "initrd"
    for name in ("bin", "proc", "sys", "dev", "modules", "lower", "upper", "new"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    unpack = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-dcq"]}
    order: list[str] = []
    for module in MODULES:
        shown = run("modprobe", "-S", kernel.version, "-d", kernel.folder, "--show-depends", module)
        for path in map(Path, re.findall(r"^insmod (\S+)", shown, re.MULTILINE)):
            name = path.name.removesuffix(".xz").removesuffix(".zst")
            if name in order:
                continue
            order.append(name)
            words = unpack.get(path.suffix, ["cat"])
            with (root / "modules" / name).open("wb") as file:
                subprocess.run([*words, path], stdout=file, check=True)
    (root / "modules/order").write_text("\n".join(order))
    (root / "command").write_text(command)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    packed = folder / "initrd.gz"
    run("sh", "-c", f"find . | cpio -o -H newc --quiet | gzip -1 >{packed}", cwd=root)
    return packed


def boot(kernel: Kernel, root: Path, busybox: Path, command: str) -> str:
    """Boot a kernel, run a command there, and return what the console showed."""
    kvm = ACCELERATED and kernel.arch == "amd64"
    machine = {
        "amd64": ["qemu-system-x86_64", "-machine", "q35"],
        "arm64": ["qemu-system-aarch64", "-machine", "virt,gic-version=3"],
    }[kernel.arch]
    emulated = {"amd64": "max,la57=off", "arm64": "cortex-a76"}[kernel.arch]
    console = {"amd64": "ttyS0", "arm64": "ttyAMA0"}[kernel.arch]
    with tempfile.TemporaryDirectory(prefix="fremap-kernel-") as name:
        folder = Path(name)
        initrd = write_initrd(kernel, busybox, command, folder)
        disk = folder / "disk"
        with disk.open("wb") as file:
            file.truncate(4 << 30)
        run("mke2fs", "-q", "-F", "-t", "ext4", disk)
        words = [
            *machine, "-accel", "kvm" if kvm else "tcg",
            "-cpu", "host,arch-capabilities=off" if kvm else emulated,
            "-smp", "2", "-m", "3G", "-nodefaults", "-no-reboot", "-display", "none",
            "-serial", "stdio", "-kernel", str(kernel.image), "-initrd", str(initrd),
            "-append", f"console={console} quiet panic=-1 mitigations=off no_timer_check",
            "-virtfs", f"local,path={root},mount_tag=host,{SHARED}",
            "-drive", f"file={disk},format=raw,if=none,id=disk,cache=unsafe",
            "-device", "virtio-blk-pci,drive=disk",
        ]  # fmt: skip
        path = CACHE / f"log-{kernel.version}"  # to be followed while the guest runs
        with path.open("wb") as log:
            try:
                subprocess.run(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    timeout=LONGEST_SECONDS, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                log.write(b"\nguest: timed out\n")
    return path.read_text(errors="replace").replace("\r", "")


def on_amd64(kernel: Kernel) -> str:
    """Run the guest's steps in this machine's own environment."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    return boot(kernel, Path("/"), busybox, f"cd {REPOSITORY} && sh tests/kernels/guest.sh\n")


def on_arm64(kernel: Kernel) -> str:
    """Run the self-test of the wheel on a small Debian for aarch64."""
    root = CACHE / "arm64-root"
    wheel = next((REPOSITORY / "dist").glob("*abi3*aarch64.whl"), None)
    if wheel is None:
        sys.exit("there is no wheel for aarch64 in dist/: make wheels")
    if not (root / "usr/bin/python3").exists():
        packages = "--include=python3-minimal,libpython3-stdlib,libstdc++6,busybox-static"
        settings = ("--variant=extract", "--arch=arm64", "--mode=root")
        run("mmdebstrap", *settings, packages, "bookworm", root)
        for name in ("sh", "awk", "tail", "cat", "env"):
            (root / "bin" / name).unlink(missing_ok=True)
            (root / "bin" / name).symlink_to("busybox")
    shutil.rmtree(root / "site", ignore_errors=True)
    python = next((root / "usr/bin").glob("python3.*"))
    fits = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *fits,
        f"--python-version={python.name[6:]}", "--target", root / "site", wheel,
    )  # fmt: skip
    shutil.copy(REPOSITORY / "tests/kernels/guest.sh", root / "guest.sh")
    command = "PYTHONPATH=/site PYTHON=/usr/bin/python3 sh /guest.sh selftest-alone\n"
    return boot(kernel, root, root / "bin/busybox", command)


def result(log: str, step: str) -> str:
    """Return what a step came to, in a few words."""
    found = re.search(rf"^guest: {step} rc=(\d+) ?(.*)$", log, re.MULTILINE)
    if found is None:
        return "not run"
    code, last = int(found[1]), found[2].strip(" =")
    if "selftest" in step:
        return f"passed: {last}" if code == 0 else f"refused: {last}"
    counts = re.sub(r" in [\d.]+s.*", "", last)
    return counts if code == 0 else f"FAILED: {counts}"


def row(kernel: Kernel, log: str) -> str:
    """Return the line of a kernel in the table."""
    where = f"Debian {kernel.suite}" + (", aarch64" if kernel.arch == "arm64" else "")
    cells = [kernel.version.removesuffix(f"-{kernel.arch}"), where]
    cells += [result(log, step) for step in STEPS]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


def write_table(rows: Sequence[str]) -> None:
    """Put rows into the page's table; it keeps those of kernels that were not booted this time."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = table.splitlines(keepends=True)
    head, by_origin = lines[:2], {line.split("|")[2]: line for line in lines[2:]}
    by_origin |= {line.split("|")[2]: line for line in rows}
    PAGE.write_text(before + BEGIN + "".join(head) + "".join(by_origin.values()) + END + after)


def main() -> int:
    """Boot the kernels; return 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("suites", nargs="*", default=SUITES, help="bookworm, arm64:trixie, …")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/kernels.md")
    arguments = parser.parse_args()
    rows, failed = [], False
    for name in arguments.suites:
        arch, _, suite = name.rpartition(":")
        kernel = unpacked(suite, arch or "amd64", arguments.mirror)
        log = on_arm64(kernel) if kernel.arch == "arm64" else on_amd64(kernel)
        rows.append(row(kernel, log))
        print(rows[-1], end="", flush=True)
        if "FAILED" in rows[-1] or "guest: done" not in log:
            failed = True
            print(log[-4000:], file=sys.stderr)
    if arguments.write:
        write_table(rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
