"""Downloads: made once, whole or not at all, and every failure is told with its mend. The registries' clients are stand-in scripts."""

from __future__ import annotations

import re
import sys
import tarfile
import time
from pathlib import Path

import pytest

from sparseling.data import fetch as fetching
from sparseling.data.fetch import FetchError, cache_folder, debian_obstacle, fetch, opened, remove_stale
from sparseling.data.readers import text_files
from sparseling.data.sources import DOMAINS, PRESETS, SOURCES, Source, select
from sparseling.errors import UsageError, UserError

WHEEL = Source("words", "pypi", ("words==1.0",), "prose", "MIT", "small", text_files)
DEBIAN = Source("books", "debian", ("books-13|books-12", "extra"), "prose", "MIT", "small", text_files)


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for python (pip), apt-get and dpkg-deb that log what they are asked; `archive/` is their registry."""
    home = tmp_path / "clients"
    archive = home / "archive"
    archive.mkdir(parents=True)
    (archive / "words-1.0-py3-none-any.whl").write_bytes(b"wheel")
    for name in ("books-12", "extra"):
        (home / name).mkdir()
        (home / name / f"{name}.txt").write_text(f"text of {name}")
        with tarfile.open(archive / f"{name}_1.0_all.deb", "w") as tar:
            tar.add(home / name / f"{name}.txt", f"usr/{name}.txt")
    log = f'echo "$@" >> {home}/log\n'
    python = script(home / "python", log + f'while [ "$1" != "--dest" ]; do shift; done; cp {archive}/words* "$2"\n')
    script(home / "bin/apt-get", f"""{log}for last; do :; done
cp {archive}/"$last"_*.deb . 2>/dev/null || {{ echo "E: No $last" >&2; exit 100; }}""")
    script(home / "bin/dpkg-deb", f'{log}tar -xf "$2" -C "$3"\n')
    monkeypatch.setenv("PATH", f"{home}/bin:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(fetching.os, "geteuid", lambda: 1000)
    fetching._apt_updated.clear()
    return home


def calls(clients: Path) -> list[str]:
    return (clients / "log").read_text().splitlines() if (clients / "log").exists() else []


def test_a_wheel_is_downloaded_once(clients: Path, tmp_path: Path) -> None:
    [path] = fetch(WHEEL, tmp_path / "cache")
    assert path.name == "words-1.0-py3-none-any.whl" and path.read_bytes() == b"wheel"
    assert fetch(WHEEL, tmp_path / "cache") == [path]
    assert len(calls(clients)) == 1 and "words==1.0" in calls(clients)[0] and "--no-deps" in calls(clients)[0]


def test_debian_packages_with_alternatives_are_unpacked_for_the_time_being(clients: Path, tmp_path: Path) -> None:
    archives = fetch(DEBIAN, tmp_path / "cache")
    assert [path.name for path in archives] == ["books-12_1.0_all.deb", "extra_1.0_all.deb"]
    with opened("debian", archives, tmp_path / "cache") as place:
        assert dict(text_files(place)) == {"usr/books-12.txt": "text of books-12", "usr/extra.txt": "text of extra"}
    assert not place.exists() and all(path.exists() for path in archives)


def test_a_failure_leaves_nothing_and_the_next_try_works(clients: Path, tmp_path: Path) -> None:
    hidden = (clients / "archive/extra_1.0_all.deb").rename(clients / "hidden")
    with pytest.raises(FetchError, match=r"apt-get: E: No extra; check the network"):
        fetch(DEBIAN, tmp_path / "cache")
    assert list((tmp_path / "cache/downloads/debian").iterdir()) == []
    hidden.rename(clients / "archive/extra_1.0_all.deb")
    assert len(fetch(DEBIAN, tmp_path / "cache")) == 2


def test_old_package_lists_are_updated_once_by_root(clients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.os, "geteuid", lambda: 0)
    (clients / "archive/extra_1.0_all.deb").rename(clients / "hidden")
    script(clients / "bin/apt-get", f'''echo "$@" >> {clients}/log
case "$*" in *update*) mv {clients}/hidden {clients}/archive/extra_1.0_all.deb; exit 0;; esac
for last; do :; done; cp {clients}/archive/"$last"_*.deb . || exit 100''')
    assert len(fetch(DEBIAN, tmp_path / "cache")) == 2
    assert sum("update" in call for call in calls(clients)) == 1


@pytest.mark.parametrize("message", ["OSError: [Errno 28] No space left on device", "write: Disk quota exceeded"])
def test_a_full_disk_is_a_user_error(clients: Path, tmp_path: Path, message: str) -> None:
    script(clients / "python", f'echo "ERROR: {message}" >&2; exit 2\n')
    with pytest.raises(UserError, match="disk is full"):
        fetch(WHEEL, tmp_path / "cache")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution found for words==1.0' >&2; exit 1", "No matching distribution"),
        ("echo '/x/python: No module named pip' >&2; exit 1", "No module named pip"),
        ("exit 7", "it ended with code 7"),
        ("exit 0", "holds no package"),
    ],
)  # fmt: skip
def test_what_the_client_says_is_passed_on(clients: Path, tmp_path: Path, body: str, told: str) -> None:
    script(clients / "python", body)
    with pytest.raises(FetchError, match=told):
        fetch(WHEEL, tmp_path / "cache")


def test_obstacles_to_debian(clients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    monkeypatch.setattr(fetching, "APT_LISTS", lists)
    assert "no package lists" in debian_obstacle()
    (lists / "mirror_main_binary-amd64_Packages.lz4").touch()
    assert debian_obstacle() == ""
    (clients / "bin/dpkg-deb").unlink()
    monkeypatch.setenv("PATH", f"{clients}/bin")
    assert "no apt-get and dpkg-deb" in debian_obstacle()


def test_missing_package_lists_are_fetched_by_root_only(clients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "APT_LISTS", tmp_path / "none")
    script(clients / "bin/apt-get", f'echo "$@" >> {clients}/log\n')
    assert debian_obstacle() and not calls(clients)
    monkeypatch.setattr(fetching.os, "geteuid", lambda: 0)
    assert debian_obstacle() == "" and calls(clients) == ["-qq update"]


def test_leftovers_of_killed_runs_go_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / "unpacked-old", tmp_path / "downloads/pypi/.partial-new"
    for folder in (old, new):
        (folder / "usr").mkdir(parents=True)
    long_ago = time.time() - 100_000
    fetching.os.utime(old, (long_ago, long_ago))
    remove_stale(tmp_path)
    assert not old.exists() and new.exists()


def test_a_package_of_old_date_is_not_taken_for_a_leftover(clients: Path, tmp_path: Path) -> None:
    fetching.os.utime(clients / "extra", (0, 0))
    with tarfile.open(clients / "archive/extra_1.0_all.deb", "w") as tar:
        tar.add(clients / "extra", ".")
    with opened("debian", fetch(DEBIAN, tmp_path / "cache"), tmp_path / "cache") as place:
        remove_stale(tmp_path / "cache")
        assert (place / "extra.txt").exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSELING_CACHE", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c"
    monkeypatch.delenv("SPARSELING_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/sparseling"


def test_the_table_of_sources() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names) and not set(names) & set(DOMAINS)
    assert len({source.packages for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert re.fullmatch(r"[a-z0-9-]+", source.name) and source.domain in DOMAINS and source.preset in PRESETS and source.licence
        if source.registry == "pypi":
            assert len(source.packages) == 1 and re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", source.packages[0])
    small, base, full = (set(select(preset)) for preset in PRESETS)
    assert small < base < full == set(SOURCES)
    assert {source.domain for source in small} == {"prose", "tech", "code", "math", "chat"}
    with pytest.raises(UsageError, match="did you mean 'small'"):
        select("smal")
