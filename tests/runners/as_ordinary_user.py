"""Run pytest as an ordinary user: `python tests/runners/as_ordinary_user.py [pytest arguments]`.

Root can do things that users cannot: take faults of the kernel, open
`/dev/userfaultfd`, ask what is resident in anybody's file. So root runs the
suite once more as `nobody`. A user who is not root has done that already.

The repository is copied, so that the run may write beside it. The interpreter
and the packages of the environment are copied only where that user cannot
reach them, as in a clone below /root.
"""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
USER = "nobody"
NOT_COPIED = (".git", ".venv", "target", "dist", ".hypothesis", ".*_cache", "__pycache__")
NOT_IN_INTERPRETER = ("__pycache__", "test", "idlelib", "site-packages", "config-*", "*.a")


def reachable(path: Path) -> bool:
    """Whether any user may come to `path` and read it."""
    path = path.resolve()
    return all(place.stat().st_mode & stat.S_IXOTH for place in [*path.parents, path])


def interpreter(scratch: Path) -> tuple[Path, dict[str, str]]:
    """An interpreter that the user can start, and the environment it needs."""
    base = Path(sys.base_prefix)
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    if reachable(executable) and reachable(base):
        return executable, {}
    home = scratch / "interpreter"
    library = Path(sysconfig.get_path("stdlib"))
    ignore = shutil.ignore_patterns(*NOT_IN_INTERPRETER)
    shutil.copytree(library, home / library.relative_to(base), ignore=ignore, symlinks=True)
    for shared in base.glob("lib/libpython*.so*"):
        shutil.copy2(shared, home / "lib" / shared.name)
    (home / "bin").mkdir()
    copied = shutil.copy2(executable, home / "bin" / executable.name)
    return Path(copied), {"PYTHONHOME": str(home), "LD_LIBRARY_PATH": str(home / "lib")}


def packages(scratch: Path) -> Path:
    """The environment's site-packages where the user can read them."""
    site = Path(sysconfig.get_path("purelib"))
    if reachable(site):
        return site
    ignore = shutil.ignore_patterns("__pycache__", "maturin*", "mypy*", "ruff*", "pip*")
    return Path(shutil.copytree(site, scratch / "site-packages", ignore=ignore, symlinks=True))


def main() -> int:
    if os.geteuid() != 0:
        print(f"as_ordinary_user: uid {os.geteuid()} is an ordinary user already; nothing to add")
        return 0
    user = pwd.getpwnam(USER)
    scratch = Path(tempfile.mkdtemp(prefix="fremap-ordinary-"))
    try:
        scratch.chmod(0o755)
        repository = Path(
            shutil.copytree(
                REPOSITORY,
                scratch / "repository",
                ignore=shutil.ignore_patterns(*NOT_COPIED),
                symlinks=True,
            )
        )
        executable, environment = interpreter(scratch)
        for name in ("home", "tmp"):
            (scratch / name).mkdir()
        environment |= {
            "PATH": f"{executable.parent}:{os.defpath}",
            "HOME": str(scratch / "home"),
            "TMPDIR": str(scratch / "tmp"),
            "PYTHONPATH": f"{repository / 'python'}:{packages(scratch)}",
            "LANG": os.environ.get("LANG", "C.UTF-8"),
        }
        for folder, _, names in os.walk(scratch):
            for path in [folder, *(os.path.join(folder, name) for name in names)]:
                os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        command = [str(executable), "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        print(f"as_ordinary_user: the suite as {USER} (uid {user.pw_uid})", flush=True)
        # exec after setuid: else /proc/self belongs to root and pagemap cannot be read.
        return subprocess.run(
            command,
            cwd=repository,
            env=environment,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
