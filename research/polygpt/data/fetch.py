"""Fetching a corpus: its archive from the registry, verified, cleaned and divided; in the cache whole or not at all."""

import errno
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from polygpt.cache import made_whole
from polygpt.data.corpora import ABOUT, CATALOGUE, Package, documents, place, split_of
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.spec import nearest

REGISTRY = "https://registry.npmjs.org"
BLOCK = 1 << 16  # bytes read at a time
PATIENCE = 60.0  # seconds without a byte after which a connection is given up; npm is given ten times as long in all

Tell = Callable[[str, int, int], None]
"""Takes what is done, how much of it, and all of it."""


class Unreachable(UserError):
    """No registry gave the archive: there is no network, or the package is not there."""


def fetch(name: str, tell: Tell = lambda what, done, total: None) -> bool:
    """Puts a corpus into the cache. Returns whether anything had to be fetched.

    Args:
        name: of the catalogue.
        tell: called with how far the download is, in kB.

    Raises:
        Unreachable: if no registry gives the package.
        UserError: if there is no such corpus, what came is not what was published, or the cache cannot be written.
    """
    if name not in CATALOGUE:
        raise UserError(f"no corpus {name!r}: {nearest(name, CATALOGUE)}")
    package, folder = CATALOGUE[name], place(name)
    if folder.is_dir():
        return False
    try:
        with made_whole(folder) as work:
            archive = _download(name, package, work, tell)
            _verify(name, package, archive)
            _write(package, archive, work)
            archive.unlink()
    except OSError as error:
        full = "free some space, or set" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "set"
        raise UserError(
            f"cannot write the corpus {name} to {folder.parent}: {error.strerror or error}: "
            f"{full} POLYGPT_CACHE to a folder that can be written"
        ) from error
    return True


def about(name: str) -> dict:
    """What `corpus.json` of a fetched corpus says.

    Raises:
        UserError: if it cannot be read.
    """
    folder = place(name)
    try:
        return json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it, and fetch {name} again") from error


def _download(name: str, package: Package, work: Path, tell: Tell) -> Path:
    """The archive, by `npm pack`, which knows the user's mirrors and proxies, or else by HTTPS."""
    reasons = []
    for way in (_by_npm, _by_https):
        try:
            return way(package, work, tell)
        except Unreachable as reason:
            reasons.append(str(reason))
    raise Unreachable(
        f"{name}: {package.name} {package.version} cannot be fetched: {'; '.join(reasons)}: go on where there is a "
        f"network, set npm_config_registry to a mirror, or copy {place(name)} from a machine that has it"
    )


def _by_npm(package: Package, work: Path, tell: Tell) -> Path:
    program = shutil.which("npm")
    if program is None:
        raise Unreachable("npm is not installed")
    tell("npm pack, kB", 0, package.size // 1000)
    words = [program, "pack", "--ignore-scripts", "--loglevel=error", f"{package.name}@{package.version}"]
    hasty = {"npm_config_fetch_retries": "1", "npm_config_update_notifier": "false"}
    try:
        # In the folder itself: that is where npm writes to.
        done = subprocess.run(
            words,
            cwd=work,
            env=hasty | os.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10 * PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"npm pack: {error}") from error
    archives = list(work.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        said = done.stderr.decode(errors="replace").split("\n")
        said = [line.removeprefix("npm ERR!").removeprefix("npm error").strip() for line in said if line.strip()]
        for archive in archives:
            archive.unlink()
        raise Unreachable(f"npm pack: {', '.join(said[:3]) or f'exit code {done.returncode}'}")
    return archives[0]


def _by_https(package: Package, work: Path, tell: Tell) -> Path:
    mirror = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY
    address, archive, done = f"{mirror.rstrip('/')}/{package.file}", work / "archive.tgz", 0
    try:
        answer = urllib.request.urlopen(address, timeout=PATIENCE)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a mirror that is no address
        raise Unreachable(f"{address}: {getattr(error, 'reason', None) or error}") from error
    with answer, archive.open("wb") as file:
        while done <= package.size:  # what is longer is wrong, and need not be read to its end
            try:
                block = answer.read(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable(f"{address}: after {done:,} bytes: {error}") from error
            if not block:
                break
            file.write(block)
            done += len(block)
            tell("download, kB", done // 1000, package.size // 1000)
    return archive


def _verify(name: str, package: Package, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    size = archive.stat().st_size
    if (size, found) != (package.size, package.sha256):
        what = (
            f"{size:,} of {package.size:,} bytes" if size < package.size else f"SHA-256 {found}, not {package.sha256}"
        )
        raise UserError(
            f"{name}: what came is not {package.name} {package.version} as it was published ({what}): try again, or "
            "from another network or mirror"
        )


def _write(package: Package, archive: Path, work: Path) -> None:
    """The documents' files and `corpus.json`."""
    counts = {split: {"documents": 0, "characters": 0} for split in ("train", "test")}
    for split in counts:
        (work / split).mkdir()
    try:
        found = documents(archive, package)
    except (ValueError, tarfile.TarError) as error:  # the bytes are right: the recipe is not
        raise RuntimeError(f"{package.name} {package.version}: {error}") from error
    for document, text in found.items():
        split = split_of(document)
        (work / split / f"{document}.txt").write_text(text + "\n", encoding="ascii", newline="\n")
        counts[split]["documents"] += 1
        counts[split]["characters"] += len(text)
    said = {"about": package.about, "licence": package.licence, "package": package.name, "version": package.version}
    content = said | {"sha256": package.sha256, "splits": counts}
    write_atomically(work / ABOUT, json.dumps(content, indent=2) + "\n")
