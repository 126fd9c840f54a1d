"""Images: decoding with Pillow, resizing, normalising."""

import dataclasses
import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from polygpt.data.media.containers.images import without_metadata
from polygpt.data.media.features import Features, one_line, read
from polygpt.errors import BadRecord

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats that are opened. Pillow reads many more, and each is another decoder exposed to untrusted bytes."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns the stored pixels upright, by EXIF orientation (CIPA DC-008, section 4.6.2)."""


@dataclasses.dataclass(frozen=True)
class ImageFeatures(Features):
    """Images as float32 [height, width, channels], normalised to (x - mean) / std for x in 0..1.

    Raw samples are uint8 [h, w, 3]: the first frame, turned upright (EXIF), composited over the background. Damaged
    metadata never rejects an image.
    """

    height: int = 32
    """Height in pixels."""
    width: int = 32
    """Width in pixels."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for greyscale (ITU-R 601 luma)."""
    resize: Literal["stretch", "crop", "pad"] = "crop"
    """How to fit another aspect ratio: stretch, crop the centre, or pad with the background."""
    mean: float = 0.5
    """Subtracted from values in 0..1."""
    std: float = 0.5
    """Divides the difference."""
    background: int = 255
    """Grey level, 0 to 255, behind transparent pixels and in the padding."""
    max_pixels: int = 50_000_000
    """Larger images are refused before decoding: a small file can expand to gigabytes."""

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
        return np.array(self._decoded(source, place))

    def extract(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        return self._fitted(Image.fromarray(raw)), 1

    def load(self, source: bytes | Path, place: str) -> tuple[np.ndarray, int]:
        return self._fitted(self._decoded(source, place)), 1

    def _decoded(self, source: bytes | Path, place: str) -> Image.Image:
        """The image in RGB."""
        encoded, orientation = without_metadata(read(source, place))
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                w, h = image.size
                if w * h > self.max_pixels:
                    raise BadRecord("too many pixels", place, f"{w} x {h}, at most {self.max_pixels} (max_pixels)")
                return _upright_rgb(image, orientation, self.background)
        except BadRecord:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadRecord("too many pixels", place, one_line(error)) from error
        except Image.UnidentifiedImageError as error:
            raise BadRecord("unknown image format", place, f"none of {', '.join(FORMATS)}") from error
        except Exception as error:  # a decoder may raise anything on damaged data
            raise BadRecord("corrupt image", place, one_line(error)) from error

    def _fitted(self, image: Image.Image) -> np.ndarray:
        """The features of an RGB image."""
        w, h = image.size
        H, W = self.height, self.width
        box, inner = (0, 0, w, h), (W, H)
        if self.resize == "crop":
            box = crop_box(w, h, W / H)
        elif self.resize == "pad":
            scale = min(W / w, H / h)
            inner = (max(1, round(w * scale)), max(1, round(h * scale)))
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
        return features

    def picture(self, features: np.ndarray, frames: int) -> np.ndarray:
        picture = np.clip(features * self.std + self.mean, 0, 1)
        return np.broadcast_to(picture, (self.height, self.width, 3))


def crop_box(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """The largest centred box with the given aspect ratio (width / height): (left, top, right, bottom).

    It never exceeds the image, not even by rounding, because Pillow would reject it.
    """
    inner_width, inner_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - inner_width) / 2, (height - inner_height) / 2
    return left, top, min(left + inner_width, width), min(top + inner_height, height)


def _upright_rgb(image: Image.Image, orientation: int, background: int) -> Image.Image:
    """An opened image with an EXIF orientation in RGB, over a grey background of 0..255. Loads all its pixels."""
    image.load()
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I"):  # 16 bits per channel: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), image)
    return image if image.mode == "RGB" else image.convert("RGB")
