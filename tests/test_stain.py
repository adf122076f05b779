"""data_prep/stain.py against closed forms: tiles mixed from known stain vectors; scikit-image where it is installed."""

import math

import numpy as np
import pytest
from PIL import Image

from data_prep import stain

H, E = np.array([.65, .70, .29]), np.array([.22, .90, .38])
TRUE = np.stack([H / np.linalg.norm(H), E / np.linalg.norm(E)])


def mixed(stains, seed=0, side=128, light=240, strength=(1.5, 0.9)):
    """A tile of known concentrations: some pixels hold one dye alone, most both, a tenth none."""
    rng = np.random.default_rng(seed)
    c = rng.gamma(2.0, 0.5, (side, side, 2)) * strength
    kind = rng.random((side, side))
    c[kind < 0.15, 1] = 0
    c[(kind >= 0.15) & (kind < 0.3), 0] = 0
    c[kind > 0.9] = 0
    od = c @ stains
    return np.clip(np.rint(light * np.exp(-od) - 1), 0, 255).astype(np.uint8), c


def angle(a, b):
    return math.degrees(math.acos(min(1, abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))))


@pytest.mark.parametrize("seed", range(3))
def test_macenko_finds_the_vectors_it_was_mixed_from(seed):
    """Within 2 degrees for several pairs of stains, in either strength; unit length; haematoxylin first."""
    rng = np.random.default_rng(seed)
    for strength in ((1.5, 0.9), (0.8, 1.4)):
        stains = TRUE + rng.uniform(-0.06, 0.06, (2, 3))
        stains /= np.linalg.norm(stains, axis=1, keepdims=True)
        found, maxima = stain.macenko(mixed(stains, seed, strength=strength)[0])
        assert np.allclose(np.linalg.norm(found, axis=1), 1)
        assert angle(found[0], stains[0]) < 2 and angle(found[1], stains[1]) < 2
        assert (maxima > 0.5).all()


def test_concentrations_are_those_mixed_in():
    """With the true vectors, least squares gives the concentrations back up to the rounding of 8 bits."""
    image, c = mixed(TRUE, strength=(0.7, 0.5))
    clear = image.min(-1) > 40                                           # rounding weighs more where it is dark
    got = stain.concentrations(stain.optical_density(image), TRUE)
    assert np.abs(got - c)[clear].max() < 0.06


def test_density_and_back():
    grey = np.arange(240, dtype=np.uint8)[:, None].repeat(3, 1)
    assert np.array_equal(stain.from_density(stain.optical_density(grey)), grey)
    assert stain.optical_density(np.uint8([[239] * 3]))[0, 0] == 0
    assert stain.optical_density(np.uint8([[0] * 3]))[0, 0] == pytest.approx(math.log(240))


def test_normalise_gives_the_target_stains():
    """After it, Macenko finds the target's vectors and 99th percentiles; a normalised image does not change again."""
    image, _ = mixed(TRUE, 1, strength=(0.9, 0.5))
    target = (np.array([[.5626, .7201, .4062], [.2159, .8012, .5581]]), np.array([1.5, 1.0]))
    target[0][:] /= np.linalg.norm(target[0], axis=1, keepdims=True)
    done = stain.normalise(image, target)
    found, maxima = stain.macenko(done)
    assert angle(found[0], target[0][0]) < 2 and angle(found[1], target[0][1]) < 2
    assert np.allclose(maxima, target[1], rtol=0.08)
    again = stain.normalise(done, target)
    assert np.abs(again.astype(int) - done)[done.min(-1) > 30].mean() < 4
    white = np.full((8, 8, 3), 239, np.uint8)
    assert (stain.normalise(white, target, source=stain.macenko(image)) == 239).all()      # an empty slide stays empty


def test_what_has_no_two_stains_is_refused():
    for image, words in ((np.full((64, 64, 3), 245, np.uint8), "0 pixels are stained"),
                         (np.arange(64 * 64, dtype=np.uint8).reshape(64, 64, 1).repeat(3, 2) // 2,
                          "one colour direction")):
        with pytest.raises(stain.StainError, match=words):
            stain.macenko(image)


def test_separation_is_exact_and_jitter_scales_it():
    """A mixture of Ruifrok's three dyes comes apart into what went in; jitter of zero is the identity; a known draw of
    factors scales the concentrations by just these."""
    rng = np.random.default_rng(0)
    c = rng.uniform(0, 0.6, (40, 40, 3))
    image = stain.combine(c)
    assert np.abs(stain.separate(image) - c).max() < 0.03
    assert np.array_equal(stain.jitter(image, rng, 0, 0), image)
    draws = np.random.default_rng(5)
    a, b = draws.uniform(0.7, 1.3, 3), draws.uniform(-0.02, 0.02, 3)
    got = stain.separate(stain.jitter(image, np.random.default_rng(5), 0.3, 0.02))
    assert np.abs(got - (stain.separate(image) * a + b)).max() < 0.04


def test_equal_to_scikit_image():
    color = pytest.importorskip("skimage.color", reason="scikit-image is not installed")
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    theirs = color.rgb2hed(image) * -math.log(1e-6)                      # it cuts negative values off
    assert np.allclose(np.maximum(stain.separate(image), 0), theirs, atol=1e-6)
    assert np.abs(color.hed2rgb(theirs / -math.log(1e-6)) * 255 - stain.combine(theirs)).max() <= 0.51


def test_command(tmp_path, capsys):
    Image.fromarray(mixed(TRUE)[0]).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "blank.png")
    assert stain.main([str(tmp_path / "a.png"), "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "a.png").is_file()
    folder = tmp_path / "in"
    (folder / "x").mkdir(parents=True)
    (tmp_path / "a.png").rename(folder / "x" / "a.png"), (tmp_path / "blank.png").rename(folder / "blank.png")
    assert stain.main([str(folder), "--out", str(tmp_path / "two"), "--target", str(folder / "x" / "a.png")]) == 1
    told = capsys.readouterr().out
    assert "blank.png: not normalised: only 0 pixels" in told and "1 of 2 images normalised" in told
    same = np.asarray(Image.open(tmp_path / "two" / "x" / "a.png")).astype(int)
    assert np.abs(same - mixed(TRUE)[0])[mixed(TRUE)[0].min(-1) > 30].mean() < 3      # its own target: unchanged
    with pytest.raises(SystemExit, match="not empty"):
        stain.main([str(folder), "--out", str(tmp_path / "two")])
