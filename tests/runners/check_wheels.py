"""Check what `make wheels` built, and run it: `python tests/runners/check_wheels.py dist`.

Each file is checked by the tools that the ecosystem has for it (twine, auditwheel, abi3audit) and
for its size. Each wheel is then installed into a bare environment, without Rust and away from this
repository, and runs `fremap selftest`; on this processor the README's code, too.

A wheel for aarch64 runs under qemu-user on a small Debian that mmdebstrap unpacks
(apt-get install qemu-user-static mmdebstrap). qemu-user has no userfaultfd, so engine "paged" is
not tried there. A free-threaded wheel runs where its interpreter is on the PATH. What could not be
run is listed at the end.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
EMULATED_ROOT = REPOSITORY / "target/aarch64-root"
MOST_BYTES = 3 << 20
WHEEL = re.compile(r"fremap-[^-]+-(?P<python>\w+)-(?P<abi>\w+)-(?P<platform>[\w.]+)\.whl")
#: The policy that each wheel is built for (see WHEEL_TARGETS in the Makefile).
POLICY = "manylinux_2_17_"


def run(*words: str | Path, **environment: str) -> str:
    """Run a program; return what it printed, or end with that."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=tempfile.gettempdir(),
        env={"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}")
    return done.stdout


def pip_settings() -> dict[str, str]:
    """Return the variables that tell pip where packages come from."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def processor(wheel: Path) -> str:
    """Return the processor that a wheel is for."""
    return "aarch64" if "aarch64" in wheel.name else "x86_64"


def check(path: Path) -> None:
    """Check one file without running it."""
    run(TOOLS / "twine", "check", "--strict", path)
    if path.suffix != ".whl":
        return
    if path.stat().st_size > MOST_BYTES:
        sys.exit(f"{path.name} has {path.stat().st_size} bytes; at most {MOST_BYTES}")
    shown = run(TOOLS / "auditwheel", "show", path)
    if POLICY + processor(path) not in shown:
        sys.exit(f"{path.name} is not {POLICY}{processor(path)}:\n{shown}")
    if "abi3" in path.name:
        run(TOOLS / "abi3audit", "--strict", path)


def selftest(*words: str | Path, engines: set[str], **environment: str) -> str:
    """Run the self-test; return which engines passed, at least those in `engines`."""
    result = json.loads(run(*words, "-m", "fremap", "selftest", "--json", **environment))
    passed = {line["engine"] for line in result["results"] if line["outcome"] == "passed"}
    if not result["passed"] or not engines <= passed:
        sys.exit(f"selftest: {result}")
    return ", ".join(sorted(passed))


def run_in_venv(wheel: Path, interpreter: str, folder: Path) -> str:
    """Install a wheel in a new environment and run it there."""
    run(interpreter, "-m", "venv", folder / "venv")
    python = folder / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", wheel, **pip_settings())
    engines = selftest(python, engines={"alias", "eager"})
    blocks = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S
    )
    script = folder / "readme.py"
    script.write_text(f"import os\nos.chdir({str(folder)!r})\n" + "\n".join(blocks))
    run(python, script)
    return f"selftest ({engines}) and the README"


def emulated_root() -> Path:
    """Return a folder with Debian's Python for aarch64, unpacked the first time."""
    if not (EMULATED_ROOT / "usr/bin/python3").exists():
        packages = "--include=python3-minimal,libpython3-stdlib,libstdc++6"
        settings = ("--variant=extract", "--arch=arm64", "--mode=root")
        run("mmdebstrap", *settings, packages, "bookworm", EMULATED_ROOT)
    return EMULATED_ROOT


def run_emulated(wheel: Path, emulator: str, folder: Path) -> str:
    """Unpack an aarch64 wheel and NumPy beside an emulated Python, and run it."""
    root = emulated_root()
    python = next((root / "usr/bin").glob("python3.*"))
    fits = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *fits,
        f"--python-version={python.name[6:]}", "--target", folder / "site", wheel,
        **pip_settings(),
    )  # fmt: skip
    engines = selftest(
        emulator, "-L", root, python,
        engines={"alias", "eager"}, PYTHONPATH=str(folder / "site"),
    )  # fmt: skip
    return f"selftest ({engines}), emulated"


def try_out(wheel: Path) -> tuple[bool, str]:
    """Run a wheel, or say what is missing for that."""
    match = WHEEL.fullmatch(wheel.name)
    if match is None:
        sys.exit(f"{wheel.name} is not named as a wheel of fremap")
    free_threaded = match["abi"].endswith("t")
    name = f"python3.{match['python'][3:]}t" if free_threaded else sys.executable
    with tempfile.TemporaryDirectory(prefix="fremap-wheel-") as folder:
        if processor(wheel) == platform.machine():
            interpreter = shutil.which(name)
            if interpreter is None:
                return False, f"there is no {name} on the PATH"
            return True, run_in_venv(wheel, interpreter, Path(folder))
        if free_threaded or processor(wheel) != "aarch64":
            return False, f"no emulated {name} for {processor(wheel)}"
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if emulator is None or shutil.which("mmdebstrap") is None:
            return False, "needs qemu-user-static and mmdebstrap"
        return True, run_emulated(wheel, emulator, Path(folder))


def main(folder: Path) -> None:
    """Check and run everything in `folder`."""
    files = sorted(folder.iterdir())
    if not any(path.suffix == ".whl" for path in files):
        sys.exit(f"there is no wheel in {folder}")
    for path in files:
        check(path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)
        if path.suffix == ".whl":
            ran, what = try_out(path)
            print(f"    {'ran' if ran else 'NOT RUN:'} {what}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
