"""Pictures: decoding with Pillow, resizing, normalising."""

import dataclasses
import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from polygpt.data.media.features import Features, one_line, read
from polygpt.errors import BadRecord

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats that are opened. Pillow reads many more, each another decoder to feed with strangers' bytes."""


@dataclasses.dataclass(frozen=True)
class ImageFeatures(Features):
    """Pictures as [height, width, channels], normalised to (x - mean) / std for x in 0..1.

    Raw samples are uint8 [h, w, 3]: upright (EXIF), of the first frame, transparency laid over the background.
    """

    height: int = 32
    """Height in pixels."""
    width: int = 32
    """Width in pixels."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey (ITU-R 601 luma)."""
    resize: Literal["stretch", "crop", "pad"] = "crop"
    """How another aspect ratio fits: stretched, its centre cropped, or padded with the background."""
    mean: float = 0.5
    """Subtracted from values in 0..1."""
    std: float = 0.5
    """Divides what is left."""
    background: int = 255
    """Grey value, 0 to 255, behind transparent pixels and in padding."""
    max_pixels: int = 50_000_000
    """Pictures of more pixels are refused before they are decoded: a small file can unfold to gigabytes."""

    def validate(self):
        self.require(self.height > 0, "height", "positive")
        self.require(self.width > 0, "width", "positive")
        self.require(self.std > 0, "std", "positive")
        self.require(0 <= self.background <= 255, "background", "in 0..255")
        self.require(0 < self.max_pixels <= Image.MAX_IMAGE_PIXELS, "max_pixels", f"in 1..{Image.MAX_IMAGE_PIXELS}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    def decode(self, source: bytes | Path, place: str) -> np.ndarray:
        encoded = read(source, place)
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                w, h = image.size
                if w * h > self.max_pixels:
                    raise BadRecord("too many pixels", place, f"{w} x {h}, at most {self.max_pixels} are decoded")
                return _upright_rgb(image, self.background)
        except BadRecord:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadRecord("too many pixels", place, one_line(error)) from error
        except Image.UnidentifiedImageError as error:
            raise BadRecord("unknown image format", place, f"none of {', '.join(FORMATS)}") from error
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise BadRecord("corrupt image", place, one_line(error)) from error

    def extract(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        h, w = raw.shape[:2]
        H, W = self.height, self.width
        box, inner = (0, 0, w, h), (W, H)
        if self.resize == "crop":
            box = crop_box(w, h, W / H)
        elif self.resize == "pad":
            scale = min(W / w, H / h)
            inner = (max(1, round(w * scale)), max(1, round(h * scale)))
        image = Image.fromarray(raw)
        if self.channels == 1:
            image = image.convert("L")
        if (w, h) != (W, H):
            image = image.resize(inner, Image.Resampling.BICUBIC, box)
        pixels = np.asarray(image).reshape(inner[1], inner[0], self.channels)
        if inner != (W, H):
            canvas = np.full(self.shape, self.background, np.uint8)
            top, left = (H - inner[1]) // 2, (W - inner[0]) // 2
            canvas[top : top + inner[1], left : left + inner[0]] = pixels
            pixels = canvas
        features = pixels * np.float32(1 / (255 * self.std))
        features -= np.float32(self.mean / self.std)
        return features, 1

    def picture(self, features: np.ndarray, frames: int) -> np.ndarray:
        picture = np.clip(features * self.std + self.mean, 0, 1)
        return np.broadcast_to(picture, (self.height, self.width, 3))


def crop_box(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """The largest box of an aspect ratio (width / height) in the centre of a picture: (left, top, right, bottom).

    It lies within the picture, to the last bit: Pillow refuses one that rounding has put beyond its edge.
    """
    inner_width, inner_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - inner_width) / 2, (height - inner_height) / 2
    return left, top, min(left + inner_width, width), min(top + inner_height, height)


def _upright_rgb(image: Image.Image, background: int) -> np.ndarray:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a channel, which Pillow's own conversion clips to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), image)
    return np.array(image.convert("RGB"))
