"""Open an image safely, and turn images into what the two model families eat.

`open_image` (path -> upright 8-bit RGB) refuses what would silently become a wrong picture. `qwen_pixels` reproduces
Qwen2-VL's published preprocessing (resize to multiples of 28, normalise, cut into patches), `clip_pixels` that of
open_clip (resize, centre crop, normalise). Needs PIL, numpy, torch; may be copied alone.

Letters: N images, P patches over all images, G_h, G_w patches down and across one image.
"""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's statistics of natural images, used by both families
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PATCH, MERGE, FRAMES = 14, 2, 2  # Qwen2.5-VL: patch side, patches along a merged cell, a still image is 2 equal frames
# preprocessor_config.json as published with Qwen2.5-VL
PREPROCESSOR = dict(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor",
                    min_pixels=3136, max_pixels=12_845_056, patch_size=PATCH, temporal_patch_size=FRAMES,
                    merge_size=MERGE, image_mean=MEAN.tolist(), image_std=STD.tolist())
SCALE, SHIFT = (1 / 255 / STD).astype(np.float32), (-MEAN / STD).astype(np.float32)  # (x/255 - MEAN) / STD in one go

# What PIL's decoders raise on damaged files; a plain OSError is the usual one, the others come out of single formats.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, OverflowError, IndexError, KeyError, struct.error, zlib.error)


class ImageError(ValueError):
    """An image that cannot be used as it is. The message names the file, what is wrong and what to do."""


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """8-bit RGB. Transparency is laid on white (as transformers 5 does; 4.x showed the colour hidden under it)."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ImageError(f"{name}: mode {image.mode!r} has more than 8 bits a channel; converting would clip it to "
                         "white or black. Scale it to 8 bits with the range it was recorded in")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(path: str | Path, max_pixels: int = 80_000_000) -> Image.Image:
    """Read a file fully and return it as upright RGB; every obstacle is an ImageError naming the file.

    Phone pictures are turned as their EXIF orientation says, CMYK is converted. Refused: missing, empty, damaged or
    cut-off files, more than 8 bits a channel, several frames or pages, more than max_pixels pixels, stripes longer than
    200 times their width (the last three checked before anything is decoded).
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{path}: {width} x {height} = {width * height:,} pixels, the limit is "
                                 f"{max_pixels:,}; cut out the region of interest, or scale it down")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a preview behind
                raise ImageError(f"{path}: {image.format} with {image.n_frames} frames; save the one that is meant as "
                                 "its own file")
            if max(width, height) > 200 * min(width, height):        # Qwen's limit; told here, where the file is known
                raise ImageError(f"{path}: {width} x {height}, one side is over 200 times the other; cut out a part")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image), str(path))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too many pixels ({error}); cut out the region of interest, or scale it down") from error
    except Image.UnidentifiedImageError as error:
        size = Path(path).stat().st_size
        what = f"not an image PIL knows ({size:,} bytes)" if size else "the file is empty"
        raise ImageError(f"{path}: {what}") from error
    except DAMAGED as error:
        raise ImageError(f"{path}: damaged or cut off ({type(error).__name__}: {error}); fetch it again") from error


def smart_resize(height: int, width: int, min_pixels: int = 3136, max_pixels: int = 12_845_056) -> tuple[int, int]:
    """Nearest multiples of 28 (half to even) that keep the aspect ratio roughly and the area within the two limits.

    smart_resize(300, 500) -> (308, 504)
    """
    side = PATCH * MERGE
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"{width} x {height}: aspect ratio above 200")
    h, w = round(height / side) * side, round(width / side) * side
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(side, math.floor(x / shrink / side) * side) for x in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(x * grow / side) * side for x in (height, width))
    return h, w


def pixel_limits(folder: str | Path) -> tuple[int, int]:
    """min_pixels, max_pixels of a model folder's preprocessor_config.json; the published ones if it has none.

    Newer files call them size.shortest_edge and size.longest_edge. ValueError if the file asks for another processing
    than qwen_pixels does.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        return PREPROCESSOR["min_pixels"], PREPROCESSOR["max_pixels"]
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
                 if asked.get(name) not in (None, PREPROCESSOR[name])]
        size = asked.get("size") or {}
        low, high = (asked.get(a) or size.get(b) or PREPROCESSOR[a]
                     for a, b in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")))
    except (ValueError, AttributeError) as error:  # not JSON; not an object
        raise ValueError(f"{path}: not a JSON object ({error}); copy it again from the model") from error
    if other:
        raise ValueError(f"{path}: {other[0]} is {asked[other[0]]}, Qwen2.5-VL's is {PREPROCESSOR[other[0]]}; it "
                         "belongs to another model: put the right one there")
    return low, high


def patchify(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8, H and W multiples of 28 -> (N * G_h * G_w, 3 * 14 * 14) uint8, one row is (channel, y, x).

    The four patches of a merged cell are neighbours in the list.
    """
    N, H, W, _ = images.shape
    side = PATCH * MERGE
    x = images.reshape(N, H // side, MERGE, PATCH, W // side, MERGE, PATCH, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # (N, G_h/2, G_w/2, 2, 2, 3, 14, 14)
    return np.ascontiguousarray(x).reshape(-1, 3 * PATCH * PATCH)


def normalised(images: Tensor) -> Tensor:
    """(N, 3, ...) uint8 -> the same shape in float32, (x / 255 - MEAN) / STD. Where the bytes are: they are sent to the
    device, a quarter of the size, and grow there."""
    out = images.new_empty(images.shape, dtype=torch.float32)
    for channel in range(3):  # plain numbers: a tensor of them would have to be sent as well
        torch.mul(images[:, channel], float(SCALE[channel]), out=out[:, channel]).add_(float(SHIFT[channel]))
    return out


def patch_values(patches: Tensor) -> Tensor:
    """(P, 3 * 14 * 14) uint8 -> (P, 3 * 2 * 14 * 14) float32, the published pixel_values: rows are (channel, frame, y, x)."""
    x = patches.view(len(patches), 3, 1, -1).expand(-1, -1, FRAMES, -1)  # (P, 3, 2, 196)
    return normalised(x).view(len(patches), -1)


def qwen_pixels(images, min_pixels: int = 3136, max_pixels: int = 12_845_056, raw: bool = False) -> tuple[Tensor, Tensor]:
    """Images -> pixel_values (P, 1176) float32 and image_grid_thw (N, 3) long, rows (1, G_h, G_w) in patches.

    images: one or a sequence of PIL images or uint8 (H, W, 3) arrays, or one uint8 (N, H, W, 3) array. An image of grid
    (1, h, w) becomes h * w / 4 tokens of the prompt. The limits belong to the model: read them from its
    preprocessor_config.json. Equals the reference processor (PIL backend) to 5e-7 before rounding; EXIF is not applied
    here, open_image has done it. raw: the patches as they are, (P, 588) uint8, which PathoVLM takes as well.
    """
    if isinstance(images, Image.Image) or isinstance(images, np.ndarray) and images.ndim == 3:
        images = [images]
    arrays = images if isinstance(images, np.ndarray) else [_resized(image, min_pixels, max_pixels) for image in images]
    if len(arrays) == 0:
        raise ImageError("no images given")
    if isinstance(arrays, np.ndarray) and arrays.shape[1:3] != smart_resize(*arrays.shape[1:3], min_pixels, max_pixels):
        arrays = [_resized(image, min_pixels, max_pixels) for image in arrays]
    if len({a.shape for a in arrays}) == 1:
        pixels = patchify(_uint8_rgb(np.asarray(arrays)))  # equally large images: one pass over all of them
    else:
        pixels = np.concatenate([patchify(a[None]) for a in arrays])
    grid = [(1, a.shape[0] // PATCH, a.shape[1] // PATCH) for a in arrays]
    pixels = torch.from_numpy(pixels)
    return pixels if raw else patch_values(pixels), torch.tensor(grid)


def _uint8_rgb(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.shape[-1] != 3:
        raise ImageError(f"array of {array.dtype} {array.shape}: expected uint8 with 3 channels last")
    return array


def _resized(image, min_pixels: int, max_pixels: int) -> np.ndarray:
    """PIL image or (H, W, 3) uint8 -> (h, w, 3) uint8 with sides that smart_resize asks for."""
    if isinstance(image, Image.Image):
        image = to_rgb(image)
        size = image.height, image.width
    else:
        image = _uint8_rgb(np.asarray(image))
        size = image.shape[:2]
    target = smart_resize(*size, min_pixels, max_pixels)
    if target != tuple(size):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = image.resize(target[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image)


def clip_pixels(images, size: int = 224, raw: bool = False) -> Tensor:
    """PIL images or uint8 (H, W, 3) arrays, one or several -> (N, 3, size, size) float32: open_clip's preprocessing.

    Shorter side to `size` by bicubic interpolation, centre crop, then RGB, in this order: a palette or transparent
    image is resized in its own mode, as open_clip does. CLIP sees only the central square of an oblong image. raw: not
    yet `normalised`, (N, 3, size, size) uint8.
    """
    if isinstance(images, Image.Image) or isinstance(images, np.ndarray) and images.ndim == 3:
        images = [images]
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            image = Image.fromarray(_uint8_rgb(np.asarray(image)))
        short, long = sorted(image.size)
        long = int(size * long / short)
        width, height = (size, long) if image.width <= image.height else (long, size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)  # half to even
        out[i] = np.asarray(to_rgb(image.crop((left, top, left + size, top + size))))
    pixels = torch.from_numpy(np.ascontiguousarray(out.transpose(0, 3, 1, 2)))  # (N, 3, size, size)
    return pixels if raw else normalised(pixels)
