"""The commands, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from fremap.bench.options import byte_size
from fremap.cli import main
from fremap.cli.checksums import file_checksums, page_checksums
from fremap.cli.numbered import first_wrong_page, numbered_pages

RunJson = Callable[..., tuple[int, Any]]


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> RunJson:
    """Run a command with --json: its exit code and what it printed."""

    def run(*words: object) -> tuple[int, Any]:
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fremap", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        check=False,
    )


def drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_pages(path: Path, first: int, count: int) -> None:
    """Read without read-ahead."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for page in range(first, first + count):
        os.pread(fd, 4096, page * 4096)
    os.close(fd)


def test_selftest_passes_wherever_an_engine_works(run_json: RunJson) -> None:
    code, result = run_json("selftest", "--pages", 300)
    assert code == 0
    assert result["passed"]
    engines = fremap.capabilities().engines
    outcomes = {(line["engine"], line["store"]): line["outcome"] for line in result["results"]}
    assert outcomes == {
        (name, store): "passed" if engine.available else "unavailable"
        for name, engine in engines.items()
        for store in ("file", "memory")
    }
    for line in result["results"]:
        numbers = [line[name] for name in ("page_count", "vma_count_before", "vma_count_after")]
        if line["outcome"] == "passed":
            assert numbers[0] == 300
            assert min(numbers) >= 1
            assert line["microseconds_a_page"] > 0
        else:
            assert numbers == [None, None, None]


def test_resident_tells_the_pages_that_were_read(
    run_json: RunJson, numbered_file: Callable[..., Path]
) -> None:
    path = numbered_file(512)
    drop_from_cache(path)
    read_pages(path, 5, 3)
    read_pages(path, 100, 1)
    code, result = run_json("resident", path)
    assert code == 0
    assert result["page_count"] == 512
    assert result["runs"] == [{"start": 5, "count": 3}, {"start": 100, "count": 1}]
    assert result["resident_page_count"] == 4


def test_prefault_brings_all_of_a_file(
    run_json: RunJson, numbered_file: Callable[..., Path]
) -> None:
    path = numbered_file(700, tail_bytes=5)
    drop_from_cache(path)
    code, result = run_json("prefault", path)
    assert code == 0
    assert (result["resident_before"], result["resident_after"]) == (0, 701)


def test_demo_makes_a_file_and_removes_it(
    run_json: RunJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, result = run_json("demo", "--size", "8M")
    assert code == 0
    assert result["verified"]
    assert result["window_page_count"] == result["file_page_count"] == 2048
    timings = result["timings"]
    assert [line["page_count"] for line in timings] == [2048] * 5
    assert all(line["microseconds_a_page"] > 0 for line in timings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs("paged")
def test_demo_shows_one_mapping_where_pieces_need_one_each(run_json: RunJson) -> None:
    _, result = run_json("demo", "--size", "8M", "--engine", "paged")
    assert result["window_vma_count"] == {"before": 1, "after": 1}
    of_pieces = [line["vma_count"] for line in result["timings"] if "mmap" in line["what"]]
    assert of_pieces[0] > 2000


def test_demo_on_a_file_of_any_content_and_size(run_json: RunJson, tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(np.random.default_rng(1).bytes(300 * 4096 + 123))
    code, result = run_json("demo", path)
    assert code == 0
    assert result["verified"]
    assert result["file_page_count"] == result["window_page_count"] == 301


def test_demo_takes_some_of_a_file_that_does_not_fit(
    run_json: RunJson, numbered_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered_file(300)
    monkeypatch.setattr("fremap.cli.demo.available_bytes", lambda: 200 * 4096)
    code, result = run_json("demo", path)
    assert code == 0
    assert result["verified"]
    assert result["window_page_count"] == 100
    assert "100 of 300 pages" in result["notes"][0]
    _, made = run_json("demo", "--size", "4M")
    assert made["file_page_count"] == 66
    assert "memory or disk is short" in made["notes"][0]


def test_demo_tells_a_wrong_page(
    run_json: RunJson, numbered_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered_file(64)
    monkeypatch.setattr("fremap.cli.demo.page_checksums", lambda pages: np.zeros(len(pages)))
    code, result = run_json("demo", path)
    assert code == 1
    assert not result["verified"]
    assert "window page 0 does not show file page" in result["wrong"]


@pytest.mark.once
def test_texts_are_ascii_where_the_terminal_is(numbered_file: Callable[..., Path]) -> None:
    path = str(numbered_file(64))
    for words in (("demo", path), ("selftest", "--pages", "8"), ("resident", path), ("doctor",)):
        done = process(*words, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
    assert not process("demo", path, PYTHONIOENCODING="utf-8").stdout.isascii()


def test_doctor_exits_with_0_where_an_engine_works(run_json: RunJson) -> None:
    code, result = run_json("doctor")
    assert code == 0
    assert result["engines"]["alias"]["available"]
    assert result["calibration"] == fremap.calibration.load().to_dict()


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("selftest", "--pages", "0"), "0 is not positive"),
        (("selftest", "--pages=-4"), "-4 is not positive"),
        (("selftest", "--pages", "many"), "'many' is not a whole number"),
        (("bench", "remap", "--pages", "0"), "0 is not positive"),
        (("bench", "remap", "--file-size", "0"), "0 is not positive"),
        (("bench", "remap", "--file-size", "1x"), "'1x' is not a size"),
        (("bench", "remap", "--rounds", "3"), "at least 5"),
        (("demo", "--size", "0"), "0 is not positive"),
        (("demo", "--size=-4M"), "'-4M' is not a size"),
    ],
)
def test_impossible_numbers_are_refused_by_the_parser(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_sizes_are_read_with_their_units() -> None:
    for text, size in (("4096", 4096), ("64M", 64 << 20), ("1g", 1 << 30), ("2 KiB", 2048)):
        assert byte_size(text) == size


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.split() == ["fremap", fremap.__version__]


def test_calibrate_measures_and_keeps(
    run_json: RunJson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, before = run_json("doctor")
    assert (code, before["calibration_kept"]) == (0, False)
    code, measured = run_json("calibrate")
    assert code == 0
    assert measured["calibration_path"] == str(tmp_path / "fremap/calibration.json")
    code, after = run_json("doctor")
    assert (code, after["calibration_kept"]) == (0, True)
    assert after["calibration"] == measured["calibration"]


def test_calibrate_says_where_it_cannot_keep(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = process("calibrate", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "XDG_CACHE_HOME" in done.stderr


def test_doctor_adds_to_a_seccomp_profile(run_json: RunJson, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    rules = [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
    code, rule = run_json("doctor", "--seccomp")
    assert code == 0
    assert rule["action"] == "SCMP_ACT_ALLOW"
    assert {"userfaultfd", "io_uring_setup", "io_uring_enter", "cachestat"} <= set(rule["names"])
    code, profile = run_json("doctor", "--seccomp", path)
    assert code == 0
    assert profile == {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [*rules, rule]}
    said = process("doctor", "--seccomp")
    assert "docker run --security-opt" in said.stdout
    assert "localhostProfile" in said.stdout
    for wrong in ("{", "[]", "{}"):
        path.write_text(wrong)
        done = process("doctor", "--seccomp", str(path))
        assert (done.returncode, done.stdout) == (1, "")
        assert "seccomp profile" in done.stderr


def test_bench_has_its_own_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert "nonblock" in said
    assert "--plot FILE" in said


@pytest.mark.once
def test_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = process("resident", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "missing" in done.stderr
    (tmp_path / "empty").touch()
    assert process("demo", str(tmp_path / "empty")).returncode == 1
    assert process("resident", str(tmp_path / "empty")).returncode == 0
    assert process("wrong").returncode == 2


@pytest.mark.once
def test_checks_find_a_single_changed_byte(numbered_file: Callable[..., Path]) -> None:
    order = np.random.default_rng(2).permutation(6000)
    pages = numbered_pages(order, 4096)
    assert first_wrong_page(pages, order) is None
    path = numbered_file(6000, tail_bytes=10)
    assert (page_checksums(pages) == file_checksums(str(path), order, 4096)).all()
    some = np.array([4, 6000, 3, 17])
    assert len(set(file_checksums(str(path), some, 4096).tolist())) == 4
    pages[5000, 4095] ^= 1
    assert first_wrong_page(pages, order) == 5000
    assert np.flatnonzero(page_checksums(pages) != file_checksums(str(path), order, 4096)) == [5000]


@pytest.mark.once
def test_inspect_lists_what_is_in_a_checkpoint(
    tmp_path: Path, run_json: RunJson, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors.numpy

    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    safetensors.numpy.save_file({"t.0": table, "one": np.array(3.0)}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"t.1": table[:2].astype("i2")}, tmp_path / "b.safetensors")
    weights = {"t.0": "a.safetensors", "one": "a.safetensors", "t.1": "b.safetensors"}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    code, result = run_json("inspect", tmp_path)
    assert code == 0
    assert [Path(file["file"]).name for file in result["files"]] == [
        "x.safetensors.index.json", "a.safetensors", "b.safetensors",
    ]  # fmt: skip
    assert [file["format"] for file in result["files"]] == ["index", "safetensors", "safetensors"]
    arrays = {array["name"]: array for file in result["files"] for array in file["arrays"]}
    assert arrays["t.1"] == {
        "name": "t.1", "dtype": "int16", "shape": [2, 4], "rows": 2, "row_bytes": 8,
        "offset": arrays["t.1"]["offset"], "bytes": 16,
    }  # fmt: skip
    assert arrays["one"]["rows"] is None
    for name, path in (("t.0", "a.safetensors"), ("t.1", "b.safetensors")):
        array = arrays[name]
        data = (tmp_path / path).read_bytes()[array["offset"] :][: array["bytes"]]
        expected = table if name == "t.0" else table[:2].astype("i2")
        assert data == expected.tobytes()

    np.save(tmp_path / "array.npy", table)
    (tmp_path / "raw").write_bytes(bytes(100))
    assert main(["inspect", str(tmp_path / "array.npy")]) == 0
    assert main(["inspect", str(tmp_path / "raw")]) == 0
    text = capsys.readouterr().out
    assert "float32  (10, 4)    10  16 bytes" in text
    assert "raw: raw, 100 bytes" in text
    assert main(["inspect", str(tmp_path / "gone")]) == 1
    assert "fremap inspect: " in capsys.readouterr().err


@pytest.mark.once
def test_inspect_tells_of_types_that_are_not_known(tmp_path: Path, run_json: RunJson) -> None:
    entries = {"four": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}}
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    code, result = run_json("inspect", path)
    assert code == 0
    assert result["files"][0]["arrays"][0]["dtype"] == "F4"


@pytest.mark.once
def test_inspect_keeps_names_from_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of any length, and with whatever a terminal would obey."""
    names = ["a" * 1_000_000, "\x1b[2Jgone", "line\nbreak", "plain"]
    places = {"dtype": "F4\x1b[0m", "shape": [2]}
    entries = {name: places | {"data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(len(names)))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert len(out) < 2000
    assert len(out.splitlines()) == 2 + len(names)
    assert "\x1b" not in out
    assert "plain" in out


def terminal(*words: str, **environment: str) -> str:
    """Run a command on a terminal; return all that it wrote there."""
    reading, writing = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "fremap", *words],
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment},
    ) as running:
        os.close(writing)
        said = b""
        while True:
            try:
                said += os.read(reading, 65536)
            except OSError:  # EIO: the other end is closed
                break
        assert running.wait() == 0
    os.close(reading)
    return said.decode()


@pytest.mark.once
def test_resident_watches_a_file(numbered_file: Callable[..., Path]) -> None:
    path = numbered_file(512)
    drop_from_cache(path)
    words = ("resident", str(path), "--watch", "0.001", "--count", "3")
    looks = [json.loads(line) for line in process(*words, "--json").stdout.splitlines()]
    assert [look["resident_page_count"] for look in looks] == [0, 0, 0]
    assert set(looks[0]) == {"file", "page_bytes", "page_count", "resident_page_count", "runs"}
    assert process(*words).stdout.count(str(path)) == 3
    assert terminal(*words).count("\x1b[5F\x1b[J") == 2  # drawn over the look before
    assert process("resident", str(path), "--count", "2").stdout.count(str(path)) == 2
    for wrong in ("0", "-1", "inf", "soon"):
        assert process("resident", str(path), "--watch", wrong).returncode == 2


@pytest.mark.once
def test_watch_follows_a_file_that_grows_and_ends_with_ctrl_c(
    numbered_file: Callable[..., Path],
) -> None:
    path = numbered_file(8)
    with subprocess.Popen(
        [sys.executable, "-m", "fremap", "resident", str(path), "--watch", "0.01", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        # Who runs the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["page_count"] == 8
        with path.open("ab") as file:
            file.write(bytes(8 * 4096))
        while json.loads(running.stdout.readline())["page_count"] != 16:
            pass
        running.send_signal(signal.SIGINT)
        running.stdout.read()
        assert running.wait() == 0


@pytest.mark.once
@pytest.mark.parametrize("rich", [True, False])
def test_prefault_draws_progress_on_a_terminal_alone(
    numbered_file: Callable[..., Path], tmp_path: Path, rich: bool
) -> None:
    path = numbered_file(9000)
    without = tmp_path / "without"
    without.mkdir()
    (without / "sitecustomize.py").write_text(
        ""
        if rich
        else "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'rich' else find(name, *rest)\n"
    )
    path_of_modules = os.pathsep.join([str(without), os.environ.get("PYTHONPATH", "")])
    said = terminal("prefault", str(path), PYTHONPATH=path_of_modules)
    assert "35.2 MiB" in said
    assert "%" in said
    done = process("prefault", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "%" not in done.stdout


@pytest.mark.once
def test_shells_complete_the_command(tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        done = process("completion", shell)
        assert done.returncode == 0
        assert "fremap" in done.stdout
    words = {
        "doc": "doctor",
        "bench ta": "take",
        "resident --wa": "--watch",
        "selftest --j": "--json",
    }
    for typed, wanted in words.items():
        line = f"fremap {typed}"
        done = process(
            _ARGCOMPLETE="1",
            _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "found"),
            _ARGCOMPLETE_IFS="\n",
            COMP_LINE=line,
            COMP_POINT=str(len(line)),
            COMP_TYPE="9",
        )
        assert done.returncode == 0
        assert (tmp_path / "found").read_text().strip() == wanted


@pytest.mark.once
def test_exit_codes_are_told_and_kept(numbered_file: Callable[..., Path]) -> None:
    for words in (("--help",), ("resident", "--help")):
        assert "130  Ctrl-C" in process(*words).stdout
    assert process("resident").returncode == 2
    assert process("resident", "/nowhere").returncode == 1


def test_shm_lists_and_removes_what_killed_processes_have_left(
    run_json: RunJson, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fremap.MemoryStore(8 * 4096)
    names = [f"command-{os.getpid()}-{which}" for which in ("used", "left")]
    child = os.fork()
    if child == 0:
        kept = fremap.Slots(store, 2, 3, shared=names[1])
        kept.ensure(0)
        os._exit(0)  # without what the interpreter does at its end
    os.waitpid(child, 0)
    with fremap.Slots(store, 2, 3, shared=names[0]):

        def listed() -> dict[str, Any]:
            code, result = run_json("shm", "list")
            assert code == 0
            return {one["name"]: one for one in result["slots"] if one["name"] in names}

        used, left = listed()[names[0]], listed()[names[1]]
        assert (used["slot_count"], used["extent_bytes"], used["filled_slots"]) == (3, 8192, 0)
        assert (used["processes"], left["processes"]) == ([os.getpid()], [])
        assert left["filled_slots"] == 1
        assert used["bytes"] > 3 * 8192
        assert main(["shm", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(names[1] in line and line.endswith("none") for line in lines)
        assert main(["shm", "remove", names[0]]) == 1
        assert "is used by 1 process(es)" in capsys.readouterr().err
        code, result = run_json("shm", "remove", names[1])
        assert (code, result["removed"]) == (0, [names[1]])
        assert set(listed()) == {names[0]}
        assert main(["shm", "remove", names[1]]) == 1
        assert "No such file" in capsys.readouterr().err
        assert main(["shm", "remove", "--force", names[0]]) == 0
        assert capsys.readouterr().out == f"removed {names[0]}\n"
        assert not listed()
