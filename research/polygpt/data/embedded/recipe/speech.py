"""Spoken numbers, and utterances with their transcripts."""

import gzip
import re
from pathlib import Path

from sound import RATE, flac, prepare
from voices import Voice, number, recording, synthesize, voices

NUMBERS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove",
    "ru": "ноль один два три четыре пять шесть семь восемь девять",
}
LONGEST_ENGLISH_WORD = 0.96  # seconds
LONGEST_WORD = 1.2  # in the other languages: one speaker is slow
LONGEST_UTTERANCE = 3.0
TAKES = {"awb": 4, "kal": 4, "ked": 4, "slt": 4}  # of an English digit, else 2: voices made from speakers are rarer


def spoken_numbers(work: Path):
    """Yields (manifest row, FLAC bytes): several takes of English digits by each synthesized voice, one of the rest."""
    for voice in voices():
        longest = LONGEST_ENGLISH_WORD if voice.language == "en" else LONGEST_WORD
        for value, word in enumerate(NUMBERS[voice.language].split()):
            several = voice.kind == "synthesized" and voice.language == "en" and value < 10
            for take in range(TAKES.get(voice.name, 2) if several else 1):
                for floor in (42, 34, 28, 24):  # if it is too long, treat breath and noise as silence
                    samples = say(work, voice, word, f"digits/{value}", take, floor)
                    if len(samples) <= longest * RATE:
                        break
                else:
                    if value < 10:
                        raise SystemExit(f"{voice.name} says {word!r} in {len(samples) / RATE:.2f} s")
                    continue
                row = {
                    "file": f"{voice.language}/{voice.name}/{value:02d}-{take}.flac",
                    "split": voice.split,
                    "language": voice.language,
                    "voice": voice.name,
                    "kind": voice.kind,
                    "number": value,
                    "word": word,
                }
                yield row, flac(samples)


def say(work: Path, voice: Voice, text: str, name: str, take: int = 0, floor: float = 42):
    """The stored form of `voice` saying `text`; `name` is the name of a human voice's recording."""
    if voice.kind == "synthesized":
        return prepare(*synthesize(voice, text, take), floor)
    return prepare(*recording(work / voice.speak[0].removeprefix("folder "), name), floor)


def transcripts(work: Path, language: str) -> dict[str, str]:
    """Recording name -> transcript, for the usable ones: short, without stage directions and broken letters."""
    package = f"asterisk-core-sounds-{language}"
    path = work / package / "usr/share/doc" / package / f"core-sounds-{language}.txt.gz"
    found = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace").splitlines():
        name, _, text = line.partition(":")
        text = " ".join(text.split()).rstrip(".… ")
        plain = re.fullmatch(r"[^\W\d_][^\d\[\](){}<>@/\\*?�_\"«»:;=]*", text)
        if not name.startswith(";") and plain and 3 <= len(text) <= 60 and not re.fullmatch(r"digits/\d+", name):
            found[name] = text
    return found


def sentences(work: Path, language: str) -> tuple[list[str], list[str]]:
    """The distinct transcripts of a language: those for training, and those held out (one in five)."""
    distinct = sorted({text for text in transcripts(work, language).values() if len(text) <= 40})
    kept = [text for text in distinct if number(language, text) % 5]
    return kept, [text for text in distinct if text not in kept]


def utterances(work: Path, human: dict[str, int], synthesized: dict[str, int]):
    """Yields (manifest row, FLAC bytes).

    Human voices, all in training: up to `human[language]` recordings of sentences not held out. Synthesized voices:
    `synthesized[split]` sentences each, those of held-out voices from the held-out sentences.
    """
    for voice in voices():
        train, test = sentences(work, voice.language)
        if voice.kind == "synthesized":
            pool = train if voice.split == "train" else test
            order = sorted(pool, key=lambda text: number(voice.name, text))
            chosen = [(text, text) for text in order]
            wanted = synthesized[voice.split]
        elif voice.split == "train":
            order = sorted(transcripts(work, voice.language).items(), key=lambda item: number(item[0]))
            chosen = [(name, text) for name, text in order if text not in test]
            wanted = human[voice.language]
        else:  # the held-out human voices have no transcripts
            continue
        count, seen = 0, set()
        for name, text in chosen:
            if count == wanted:
                break
            if text in seen or voice.kind == "human" and not exists(work, voice, name):
                continue
            samples = say(work, voice, text, name)
            if len(samples) > LONGEST_UTTERANCE * RATE:
                continue
            seen.add(text)
            row = {
                "file": f"{voice.language}/{voice.name}/{count:03d}.flac",
                "split": voice.split,
                "language": voice.language,
                "voice": voice.name,
                "kind": voice.kind,
                "text": text,
            }
            yield row, flac(samples)
            count += 1


def exists(work: Path, voice: Voice, name: str) -> bool:
    return recording(work / voice.speak[0].removeprefix("folder "), name) is not None
