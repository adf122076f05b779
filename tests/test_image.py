"""Pixels against transformers' own processors, and the files nobody should train on."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nanopatho.image import ImageError, clip_pixels, normalised, open_image, patch_values, pixel_limits, qwen_pixels, smart_resize, to_rgb


def picture(width, height, mode="RGB", seed=0):
    """A smooth random picture (noise would hide nothing that bicubic resizing does wrong, but compresses badly)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(height // 9, 2), max(width // 9, 2), 4), dtype=np.uint8), "RGBA")
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def reference(images, min_pixels=3136, max_pixels=12_845_056):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    out = module.Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)(images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


@pytest.mark.parametrize("sizes, limits", [
    ([(112, 112)] * 3, {}), ([(100, 37), (300, 500), (28, 28)], {}), ([(14, 140), (1, 5)], {}),
    ([(42, 70), (70, 98)], {}),
    ([(300, 200), (640, 480)], dict(max_pixels=50_000)), ([(60, 90)], dict(min_pixels=40_000)),
    ([(2000, 12)], dict(max_pixels=20_000))],
    ids=str)
def test_qwen_pixels_equal_the_reference(sizes, limits):
    images = [picture(w, h, seed=i) for i, (w, h) in enumerate(sizes)]
    pixels, grid = qwen_pixels(images, **limits)
    expected, expected_grid = reference(images, **limits)
    assert torch.equal(grid, expected_grid) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, atol=2e-6, rtol=0)
    patches, _ = qwen_pixels(images, **limits, raw=True)
    assert patches.dtype == torch.uint8 and patches.nbytes * 8 == pixels.nbytes and torch.equal(patch_values(patches), pixels)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_modes_equal_the_reference(mode):
    image = picture(90, 61, mode)
    torch.testing.assert_close(qwen_pixels([image])[0], reference([image])[0], atol=2e-6, rtol=0)


def test_transparent_palette_is_laid_on_white():
    image = picture(56, 56, "P")
    image.info["transparency"] = image.getpixel((0, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    torch.testing.assert_close(qwen_pixels([image])[0], reference([image])[0], atol=2e-6, rtol=0)


def test_arrays_stacks_and_single_images_are_the_same():
    images = [picture(112, 84, seed=i) for i in range(4)]
    pixels, grid = qwen_pixels(images)
    arrays = [np.asarray(image) for image in images]
    for other in (arrays, np.stack(arrays), tuple(arrays)):
        again, other_grid = qwen_pixels(other)
        assert torch.equal(again, pixels) and torch.equal(other_grid, grid)
    assert torch.equal(qwen_pixels(arrays[0])[0], pixels[:48]) and torch.equal(qwen_pixels(images[0])[0], pixels[:48])
    odd = np.stack([np.asarray(picture(50, 70, seed=i)) for i in range(2)])
    assert torch.equal(qwen_pixels(odd)[0], qwen_pixels([Image.fromarray(a) for a in odd])[0])
    assert grid.tolist() == [[1, 6, 8]] * 4 and pixels.shape == (4 * 48, 1176)


def test_smart_resize_equals_the_reference():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    for h, w in rng.integers(1, 3000, (2000, 2)).tolist() + [(14, 42), (42, 14), (70, 98), (3584, 3584), (9000, 9000)]:
        if max(h, w) > 200 * min(h, w):
            with pytest.raises(ImageError, match="aspect"):
                smart_resize(h, w)
            continue
        for low, high in ((3136, 12_845_056), (50_000, 400_000)):
            assert smart_resize(h, w, low, high) == module.smart_resize(h, w, 28, low, high), (h, w)


@pytest.mark.parametrize("shape, dtype", [((28, 28, 3), np.float32), ((28, 28, 4), np.uint8), ((3, 28, 28), np.uint8)])
def test_wrong_arrays_are_refused(shape, dtype):
    with pytest.raises(ImageError, match="uint8"):
        qwen_pixels([np.zeros(shape, dtype)])


def test_limits_come_from_the_model_folder(tmp_path):
    assert pixel_limits(tmp_path) == (3136, 12_845_056)                # as published
    for asked in (dict(min_pixels=50_176, max_pixels=1_003_520),
                  dict(size=dict(shortest_edge=50_176, longest_edge=1_003_520))):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(asked))
        assert pixel_limits(tmp_path) == (50_176, 1_003_520)
    for content, says in (('{"patch_size": 16}', "patch_size is 16, Qwen2.5-VL's is 14"), ("[]", "not a JSON object"),
                          ('{"image_mean": [0.5, 0.5, 0.5]}', "image_mean"), ("{", "not a JSON object")):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"{tmp_path}/preprocessor_config.json: .*{says}"):
            pixel_limits(tmp_path)


# ---------------------------------------------------------------------------------------------------- CLIP


@pytest.mark.parametrize("size", [(300, 224), (640, 480), (100, 100), (224, 224), (224, 448), (56, 40)])
def test_clip_pixels_equal_the_reference(size):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = picture(*size)
    surplus = int(224 * max(size) / min(size)) - 224
    assert surplus % 4 != 3  # there the reference floors the crop, open_clip rounds half to even; see the next test
    expected = module.CLIPImageProcessorPil()([image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip_pixels([image]), expected, atol=2e-6, rtol=0)


def test_clip_crop_rounds_half_to_even():
    for width, left in [(225, 0), (227, 2), (226, 1), (229, 2)]:
        columns = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (224, width, 3))
        first = clip_pixels(columns)[0, 0, 0, 0].item() * 0.26862954 + 0.48145466
        assert round(first * 255) == left


def test_clip_resizes_a_palette_image_before_rgb():
    image = picture(300, 260, "P")
    small = image.resize((258, 224), Image.Resampling.BICUBIC)
    assert torch.equal(clip_pixels(image), clip_pixels(small))
    assert torch.equal(clip_pixels(small), clip_pixels(small.convert("RGB")))
    assert torch.equal(normalised(clip_pixels(small, raw=True)), clip_pixels(small))


# ---------------------------------------------------------------------------------------------------- files


def test_good_files_open_upright_in_rgb(tmp_path):
    image = picture(60, 40)
    for name, mode in [("a.png", "RGB"), ("grey.png", "L"), ("bits.png", "1"), ("cmyk.jpg", "CMYK"), ("a.tif", "RGB"),
                       ("palette.gif", "P")]:
        image.convert(mode).save(tmp_path / name)
        opened = open_image(tmp_path / name)
        assert (opened.mode, opened.size) == ("RGB", (60, 40)), name
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: rotate by 270 degrees to see it upright
    image.save(tmp_path / "phone.jpg", exif=exif, quality=100)
    upright = np.asarray(open_image(tmp_path / "phone.jpg")).astype(int)
    assert np.abs(upright - np.asarray(image.transpose(Image.Transpose.ROTATE_270))).mean() < 3
    clear = Image.new("RGBA", (30, 30), (200, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((5, 5)) == (255, 255, 255)


def test_bad_files_are_refused_by_name(tmp_path):
    image = picture(200, 160)
    image.save(tmp_path / "whole.jpg")
    image.save(tmp_path / "whole.png")
    for kind in ("jpg", "png"):
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[:len(data) // 2])
        (tmp_path / f"head.{kind}").write_bytes(data[:12])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((30, 30), np.float32), "F").save(tmp_path / "float.tif")
    image.save(tmp_path / "film.gif", save_all=True, append_images=[picture(200, 160, seed=1)])
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[picture(200, 160, seed=1)])
    reasons = {"cut.jpg": "damaged", "cut.png": "damaged", "head.jpg": "damaged|not an image",
               "head.png": "damaged|not an image", "empty.png": "empty", "text.png": "not an image",
               "deep.png": "8 bits", "float.tif": "8 bits", "film.gif": "2 frames", "pages.tif": "2 frames",
               "absent.png": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ImageError, match="32,000 pixels, the limit is 30,000"):
        open_image(tmp_path / "whole.png", max_pixels=30_000)


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    with pytest.raises(ImageError, match="pixels"):
        open_image(tmp_path / "bomb.png")
