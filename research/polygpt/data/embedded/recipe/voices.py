"""The voices: name, language, split, and how to synthesize them.

A voice is one speaker. Recordings of one speaker by two programs (flite and festival both carry the speakers kal and
slt) count as one voice.
"""

import dataclasses
import functools
import hashlib
import io
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile


@dataclasses.dataclass(frozen=True)
class Voice:
    name: str
    language: str
    kind: str  # "human" or "synthesized"
    split: str  # "train" or "test"
    speak: tuple[str, ...]  # programs by take: "espeak en-us+f4", "flite rms", "festival ked_diphone", or "folder ..."


HELD_OUT_VARIANTS = {"f4", "m7", "Alicia", "Diogo", "edward2", "klatt4", "grandpa", "linda"}
ENGLISH = {  # accent -> variants of espeak-ng
    "en-us": "m1 m4 f1 f3 f4 m7 Alex Andrea Denis Lee Mario Michael aunty belinda klatt shelby steph zac",
    "en-gb": "m2 m6 f2 f5 Diogo Annie Hugo Marco benjamin ed edward2 john linda max norbert paul sandro",
    "en-gb-x-rp": "m3 grandma Jacky boris quincy travis Alicia",
    "en-gb-scotland": "m5 pablo rob victor grandpa",
    "en-gb-x-gbclan": "m8 anika",
    "en-gb-x-gbcwmd": "croak david",
    "en-029": "caleb klatt4",
    "en-us-nyc": "Gene adam",
}
FOREIGN = {"es": "es-419 es", "fr": "fr-fr", "it": "it", "ru": "ru"}
FOREIGN_VARIANTS = "m1 m3 m5 f1 f2 f5 Andrea m7 f4"  # m7 and f4 are held out in every language
ASTERISK = "{package}/usr/share/asterisk/sounds/{folder}"
HUMAN = [
    ("allison-en", "en", "train", "asterisk-core-sounds-en-wav", "en_US_f_Allison"),
    ("allison-es", "es", "train", "asterisk-core-sounds-es-wav", "es_MX_f_Allison"),
    ("june", "fr", "train", "asterisk-core-sounds-fr-wav", "fr_CA_f_June"),
    ("armelle", "fr", "test", "asterisk-prompt-fr-armelle", "fr"),
    ("carlo", "it", "train", "asterisk-core-sounds-it-wav", "it_IT_m_Carlo"),
    ("menardi", "it", "test", "asterisk-prompt-it-menardi-wav", "it_IT_f_Menardi"),
    ("ivrvoice", "ru", "train", "asterisk-core-sounds-ru-wav", "ru_RU_f_IvrvoiceRU"),
]
# Synthesized from a person's recordings: closer to human voices than formant synthesis.
FROM_SPEAKERS = [
    ("awb", "train", ("flite awb",)),
    ("kal", "train", ("flite kal16", "festival kal_diphone")),
    ("ked", "train", ("festival ked_diphone",)),
    ("slt", "train", ("flite slt", "festival cmu_us_slt_arctic_hts")),
    ("rms", "test", ("flite rms",)),
]


def voices() -> list[Voice]:
    """Every voice, in a fixed order."""
    found = [
        Voice(name, language, "human", split, (f"folder {ASTERISK.format(package=package, folder=folder)}",))
        for name, language, split, package, folder in HUMAN
    ]
    found += [Voice(name, "en", "synthesized", split, speak) for name, split, speak in FROM_SPEAKERS]
    accents = [("en", accent, variants) for accent, variants in ENGLISH.items()]
    accents += [(language, names.split()[0], FOREIGN_VARIANTS) for language, names in FOREIGN.items()]
    for language, accent, variants in accents:
        for variant in variants.split():
            split = "test" if variant in HELD_OUT_VARIANTS else "train"
            name = f"{accent}-{variant}".lower()
            found.append(Voice(name, language, "synthesized", split, (f"espeak {accent}+{variant}",)))
    return found


def number(*key) -> int:
    """A number that depends only on the key: the recipe's only source of variation."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


@functools.cache
def synthesize(voice: Voice, text: str, take: int) -> tuple[np.ndarray, int]:
    """(samples, rate) of a synthesized voice saying `text`; each take has its own speed and pitch."""
    engine, name = voice.speak[take % len(voice.speak)].split(" ", 1)
    chance = number(voice.name, text, take)
    pace, pitch = (chance % 1000) / 1000, (chance // 1000 % 1000) / 1000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        if engine == "espeak":
            speed, tone = 140 + int(50 * pace), 35 + int(30 * pitch)
            command = ["espeak-ng", "-v", name, "-s", str(speed), "-p", str(tone), "-w", path, text]
            subprocess.run(command, check=True, capture_output=True)
        elif engine == "flite":
            stretch = f"duration_stretch={0.9 + 0.3 * pace:.2f}"
            command = ["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", path]
            subprocess.run(command, check=True, capture_output=True)
        else:
            scheme = (
                f"(voice_{name}) (Parameter.set 'Duration_Stretch {0.9 + 0.3 * pace:.2f}) "
                f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}" \'riff)'
            )
            subprocess.run(["festival", "--pipe"], input=scheme.encode(), check=True, capture_output=True)
        return soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")


def recording(folder: Path, name: str) -> tuple[np.ndarray, int] | None:
    """(samples, rate) of a human voice's recording `name`, or None if the package lacks it."""
    for suffix, skip in ((".wav", 0), (".gsm", 600)):  # GSM recordings begin with a jump in level
        if (folder / f"{name}{suffix}").is_file():
            samples, rate = soundfile.read(folder / f"{name}{suffix}", dtype="float32")
            return samples[skip:], rate
    return None
