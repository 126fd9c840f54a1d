"""The Debian packages that provide the data: downloaded and unpacked, or installed if they are programs."""

import os
import subprocess
from pathlib import Path

SYNTHESIZERS = (
    "espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts festlex-cmu festlex-poslex"
).split()
BIBLE = "bible-kjv"  # a program that prints the text
DATA = [
    *(f"asterisk-core-sounds-{language}{kind}" for language in ("en", "es", "fr", "it", "ru") for kind in ("", "-wav")),
    "asterisk-prompt-fr-armelle",
    "asterisk-prompt-it-menardi-wav",
    "openclipart-png",
    "openclipart-svg",
    "wordnet-base",
]
# Debian 12: asterisk-core-sounds 1.6.1-1, asterisk-prompt-fr-armelle 20070613-2.2, asterisk-prompt-it-menardi
# 1:1.4.22+mm20110907-3.1, openclipart 1:0.18+dfsg-19, wordnet 1:3.0-37, bible-kjv 4.38, espeak-ng 1.51, flite 2.2,
# festival 2.5, festvox-kallpc16k 2.4-1, festvox-kdlpc16k 1.4.0-6.1, festvox-us-slt-hts 0.2010.10.25-4.
# Left out: asterisk-prompt-es-co (its recordings are under the GPL).


def fetch(work: Path) -> None:
    """Installs the programs and unpacks every data package into `work/<package>`."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *SYNTHESIZERS, BIBLE]
    subprocess.run(install, check=True, env=environment, stdout=subprocess.DEVNULL)
    work.mkdir(parents=True, exist_ok=True)
    for package in DATA:
        if (work / package).is_dir():
            continue
        subprocess.run(["apt-get", "download", "-qq", package], check=True, cwd=work)
        (archive,) = work.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, work / package], check=True)
        archive.unlink()
