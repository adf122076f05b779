"""Stain tools: estimate the two stains of a slide, give an image the colours of another, separate and jitter stains.

    python -m data_prep stain tiles/ --out normalised/ [--target reference.png]

Light is absorbed (Beer-Lambert): I = I0 exp(-sum_s c_s v_s), so in optical density OD = -ln(I / I0) dyes add up, and an
image is concentrations times stain vectors. `macenko` finds the vectors of one image (Macenko et al. 2009), `normalise`
recomposes its concentrations with those of a reference, `separate` uses the fixed vectors of Ruifrok & Johnston 2001
(haematoxylin, eosin, DAB), `jitter` disturbs their concentrations (Tellez et al. 2018) as a training augmentation.
Needs numpy; the command needs Pillow too. May be copied with nanopatho/image.py.

Letters: H, W image; N pixels; S stains (2 or 3); OD unit-free, one value a colour channel.
"""
import argparse
from pathlib import Path

import numpy as np

LIGHT = 240.0                            # grey level of the empty slide that Macenko's method assumes
HED = np.array([[.65, .70, .29], [.07, .99, .11], [.27, .57, .78]])  # Ruifrok & Johnston, as printed: not unit length
# What the common implementations normalise to: stains (2, 3), 99th percentile of the concentrations (2,).
REFERENCE = (np.array([[.5626, .7201, .4062], [.2159, .8012, .5581]]), np.array([1.9705, 1.0308]))


class StainError(ValueError):
    """An image whose stains cannot be estimated; the message says why."""


def optical_density(rgb, light=LIGHT):
    """uint8 (..., 3) -> OD (..., 3) float64; +1 keeps black finite: 0 -> ln(light), light - 1 -> 0."""
    return -np.log((np.asarray(rgb, np.float64) + 1) / light)


def from_density(od, light=LIGHT):
    """OD (..., 3) -> uint8 (..., 3), the inverse of optical_density up to rounding and the ends of the range."""
    return np.clip(np.rint(light * np.exp(-od) - 1), 0, 255).astype(np.uint8)


def concentrations(od, stains):
    """OD (..., 3), stains (S, 3) -> least-squares concentrations (..., S); may be slightly negative by noise."""
    return od @ np.linalg.pinv(stains)


def macenko(rgb, *, light=LIGHT, beta=0.15, alpha=1.0, least=100):
    """uint8 (H, W, 3) -> stains (2, 3) of unit length, haematoxylin first, and the 99th percentiles (2,) of their
    concentrations.

    Pixels with a channel below `beta` are background. The OD of the rest lies near the plane of the two largest
    eigenvectors of its covariance; the stains are its directions at the `alpha`-th and (100 - alpha)-th percentile of
    the angle in that plane. StainError: fewer than `least` tissue pixels, or all of one direction (a single dye).
    """
    od = optical_density(rgb, light).reshape(-1, 3)                      # (N, 3)
    tissue = od[(od >= beta).all(1)]
    if len(tissue) < least:
        raise StainError(f"only {len(tissue)} pixels are stained (OD >= {beta} in every channel); {least} are needed")
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, [2, 1]]               # (3, 2), largest first
    plane *= np.where(plane.sum(0) < 0, -1, 1)                           # eigenvectors come with either sign
    flat = tissue @ plane                                                # (N, 2)
    centre = np.arctan2(*flat.mean(0)[::-1])                             # angles about the mean: no jump at +-pi
    angle = np.angle(np.exp(1j * (np.arctan2(flat[:, 1], flat[:, 0]) - centre))) + centre
    low, high = np.percentile(angle, (alpha, 100 - alpha))
    if high - low < 0.02:                                                # 1 degree: a grey scan has 0, H&E about 15-35
        raise StainError(f"the stained pixels have one colour direction (spread {np.degrees(high - low):.2f} degrees)")
    stains = np.array([plane @ (np.cos(a), np.sin(a)) for a in (low, high)])
    stains = stains[np.argsort(-stains[:, 0])]                           # haematoxylin absorbs more red
    return stains, np.percentile(np.maximum(concentrations(od, stains), 0), 99, axis=0)


def normalise(rgb, target=REFERENCE, *, source=None, light=LIGHT):
    """uint8 (H, W, 3) -> the same tissue in the stains of `target`, a pair (stains, maxima) as macenko returns it.

    source: such a pair of the image itself, or of the slide it was cut from (steadier for small tiles); None estimates.
    """
    stains, maxima = source or macenko(rgb, light=light)
    c = concentrations(optical_density(rgb, light), stains) * (target[1] / np.maximum(maxima, 1e-6))
    return from_density(np.maximum(c, 0) @ target[0], light)


def separate(rgb, stains=HED, light=255.0):
    """uint8 (H, W, 3) -> concentrations (H, W, S): haematoxylin, eosin, DAB. skimage's rgb2hed divides these by -ln
    1e-6."""
    return concentrations(-np.log(np.maximum(np.asarray(rgb, np.float64) / light, 1e-6)), stains)


def combine(c, stains=HED, light=255.0):
    """Concentrations (H, W, S) -> uint8 (H, W, 3), the inverse of separate."""
    return np.clip(np.rint(light * np.exp(-(c @ stains))), 0, 255).astype(np.uint8)


def jitter(rgb, rng, alpha=0.05, beta=0.01):
    """c -> a c + b for each of H, E and DAB, a from 1 +- alpha, b from +-beta (in OD); light 0.05, strong 0.3.

    rng: numpy Generator; alpha = beta = 0 gives the image back.
    """
    scale, shift = rng.uniform(1 - alpha, 1 + alpha, 3), rng.uniform(-beta, beta, 3)
    return combine(separate(rgb) * scale + shift)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep stain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="an image, or a folder of images (with the folders inside it)")
    parser.add_argument("--out", required=True, help="folder for the normalised images, as PNG under the same names")
    parser.add_argument("--target", help="take the colours of this image (default: the published reference)")
    args = parser.parse_args(argv)
    from PIL import Image

    from data_prep.records import SUFFIXES
    from nanopatho.image import ImageError, open_image
    source, out = Path(args.images), Path(args.out)
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{source}: no image there ({', '.join(sorted(SUFFIXES))})")
    try:
        target = macenko(np.asarray(open_image(args.target))) if args.target else REFERENCE
    except (ImageError, StainError) as error:
        raise SystemExit(f"--target {args.target}: {error}") from error
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: is not empty; choose another --out")
    failed = 0
    for path in files:
        name = out / (path.relative_to(source) if path != source else Path(path.name)).with_suffix(".png")
        if name.exists():                                                 # a.jpg beside a.tif
            name = name.with_name(path.name + ".png")
        try:
            rgb = np.asarray(open_image(path))
            own = macenko(rgb)
        except (ImageError, StainError) as error:
            print(f"{path}: not normalised: {error}")
            failed += 1
            continue
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(normalise(rgb, target, source=own)).save(name)
        h, e = own[0].round(3).tolist()
        print(f"{path}: haematoxylin {h}, eosin {e} -> {name}")
    print(f"{len(files) - failed} of {len(files)} images normalised")
    return 1 if failed else 0
