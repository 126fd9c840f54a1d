"""Handwritten digits, and clip art with captions."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from voices import number

SIZE = 32
SETS = "gradients patterns stars flowchart callouts cards smilies map_symbols roadsigns led aiga-symbols".split()
DULL = "clipart image icon icons symbol iconset various collection sign signs shape shapes button buttons".split()
UNWANTED = {"swastika", "nude", "naked", "sexy", "nazi", "sex"}
SMALL_WORDS = {"of", "with", "on", "and", "the", "a", "in", "for", "at", "to", "an", "from", "by"}


def digits():
    """Yields (manifest row, PNG bytes) of the 8x8 grey digits; every sixth picture is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for index, (picture, label) in enumerate(zip(data.images, data.target, strict=True)):
        grey = np.round(picture * (255 / 16)).astype(np.uint8)
        row = {"file": f"{index:04d}.png", "split": "test" if index % 6 == 5 else "train", "number": int(label)}
        yield row, png(Image.fromarray(grey, "L"))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def lemmas(work: Path) -> set[str]:
    """The single words in WordNet, used to recognise English captions."""
    known = set()
    for part in ("noun", "verb", "adj", "adv"):
        path = work / "wordnet-base/usr/share/wordnet" / f"index.{part}"
        for line in path.read_text(encoding="latin-1").splitlines():
            word = line.split(" ", 1)[0]
            if word.isalpha() and len(word) > 2:
                known.add(word)
    return known


def caption(title: str, folder: str, known: set[str]) -> str | None:
    """A clean lower-case English caption of one to four words, or None."""
    title = re.sub(r"(?i)^clipart by [^-]*-\s*", "", title.strip())
    title = re.sub(r"([a-z])([A-Z])", r"\1 \2", title)
    title = re.sub(r"\(.*?\)|\b(?i:bw|b/w|3d|svg|remix|icon)\b", " ", title)
    title = re.sub(r"[\d_\-,.:!&/]+", " ", title)
    words = title.lower().split()
    while words and (words[-1] in SMALL_WORDS or len(words[-1]) == 1):
        words.pop()
    if "/flags/" in f"/{folder}/" and "flag" not in words:
        words.append("flag")
    good = all(w in SMALL_WORDS or w in known or w.endswith("s") and w[:-1] in known for w in words)
    if not good or not 1 <= len(words) <= 4 or UNWANTED & set(words) or all(w in DULL for w in words):
        return None
    return " ".join(words)


def clip_art(work: Path, at_most: int, same_caption: int = 3):
    """Yields (manifest row, PNG bytes): 32x32 pictures of at most 64 colours on white; one in ten is held out."""
    known = lemmas(work)
    vectors = work / "openclipart-svg/usr/share/openclipart/svg"
    rasters = work / "openclipart-png/usr/share/openclipart/png"
    chosen, counts, looks = [], {}, set()
    paths = sorted(vectors.rglob("*.svg"), key=lambda path: number(str(path.relative_to(vectors))))
    for path in paths:
        relative = path.relative_to(vectors)
        raster = rasters / relative.with_suffix(".png")
        if any(part in str(relative) for part in SETS) or not raster.is_file():
            continue
        title = re.search(r"<dc:title[^>]*>([^<]*)</dc:title>", path.read_text(errors="replace"))
        text = caption(title.group(1), str(relative.parent), known) if title else None
        text = text or caption(path.stem, str(relative.parent), known)
        if text is None or counts.get(text, 0) == same_caption:
            continue
        picture = shrink(raster)
        if picture is None:
            continue
        look = picture.resize((8, 8), Image.Resampling.BOX).quantize(8).convert("L").tobytes()
        if look in looks or np.ptp(np.asarray(picture)) < 64:  # a copy of another, or nearly blank
            continue
        looks.add(look)
        counts[text] = counts.get(text, 0) + 1
        chosen.append((str(relative.with_suffix(".png")), text, png(picture.quantize(64))))
        if len(chosen) == at_most:
            break
    for name, text, data in sorted(chosen):
        split = "test" if number("picture", name) % 10 == 0 else "train"
        yield {"file": name, "split": split, "text": text}, data


def shrink(path: Path) -> Image.Image | None:
    """The picture centred on a white square of SIZE x SIZE pixels, without distortion; None above 4 megapixels."""
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        try:
            with Image.open(path) as opened:
                if opened.width * opened.height > 4_000_000:
                    return None
                picture = opened.convert("RGBA")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            return None
    box = picture.getchannel("A").getbbox()
    picture = picture.crop(box) if box else picture
    picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2), picture)
    return canvas
