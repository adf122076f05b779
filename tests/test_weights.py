"""Weights travel between transformers' folders and ours, in every published layout; what does not fit is named."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vlm import CONFIG, prompt, reference_logits, spread_weights

from nanopatho import weights
from nanopatho.vlm import PathoVLM

NEWER = {"visual.": "model.visual.", "model.": "model.language_model."}


def fresh(tie=True):
    torch.manual_seed(0)
    return spread_weights(PathoVLM(copy.deepcopy(CONFIG) | dict(tie_word_embeddings=tie)))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def edit(folder, change):
    """Rewrite model.safetensors after change(dict of tensors)."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard_bytes", [10 ** 9, 100_000])
@torch.no_grad()
def test_our_folder_in_transformers_and_theirs_in_ours(tmp_path, tie, shard_bytes):
    transformers = pytest.importorskip("transformers")
    model = fresh(tie)
    model.save_pretrained(tmp_path / "ours", shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors").exists() == (shard_bytes == 10 ** 9)
    reference, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = prompt([[(8, 8)], [(4, 12)]], 12)
    ids, mask, pixels, grid = inputs
    expected = reference_logits(reference.eval(), *inputs)[mask.bool()]
    torch.testing.assert_close(model(ids, pixels, grid, mask)[mask.bool()], expected, atol=5e-5, rtol=0)
    # back again: sharded by transformers, with the nested config.json it writes today
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    assert "text_config" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    back = PathoVLM.from_pretrained(tmp_path / "theirs")
    assert same(back, model) and (back.lm_head is None) == tie


def test_newer_spelling_and_redundant_head(tmp_path):
    model = fresh()
    model.save_pretrained(tmp_path)

    def respell(tensors):
        new = {next(b + n.removeprefix(a) for a, b in NEWER.items() if n.startswith(a)): t for n, t in tensors.items()}
        return new | {"lm_head.weight": torch.zeros(192, 96)}  # a tied model ignores it
    edit(tmp_path, respell)
    assert same(PathoVLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tie", [True, False])
def test_silent_config_lets_the_files_decide(tmp_path, tie):
    fresh(tie).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (PathoVLM.from_pretrained(tmp_path).lm_head is None) == tie


def test_dtype(tmp_path):
    model = fresh().bfloat16()
    model.save_pretrained(tmp_path)
    assert same(PathoVLM.from_pretrained(tmp_path), model)
    wide = PathoVLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and same(wide.bfloat16(), model)


def test_every_problem_is_listed_at_once(tmp_path):
    fresh(tie=False).save_pretrained(tmp_path)

    def spoil(tensors):
        del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(95)
        tensors["visual.extra.bias"] = torch.ones(3)
        tensors["model.visual.merger.ln_q.weight"] = torch.ones(40)
    edit(tmp_path, spoil)
    with pytest.raises(ValueError) as caught:
        PathoVLM.from_pretrained(tmp_path)
    text = str(caught.value)
    for part in ("missing lm_head.weight (192, 96)", "missing model.layers.1.mlp.up_proj.weight (128, 96)",
                 "unexpected visual.extra.bias (3,)", "visual.merger.ln_q.weight is there twice",
                 "model.norm.weight in model.safetensors has shape (95,), config.json asks for (96,)"):
        assert part in text


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        PathoVLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        PathoVLM.from_pretrained(tmp_path)
    fresh().save_pretrained(tmp_path, 100_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "hidden")
    with pytest.raises(FileNotFoundError, match=shard.name):
        PathoVLM.from_pretrained(tmp_path)
    (tmp_path / "hidden").rename(shard)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard.name
    (tmp_path / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="disagree.*model.norm.weight"):
        PathoVLM.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    model, calls = fresh(), []
    model.save_pretrained(tmp_path, 100_000)

    def dies(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        return save_file(*args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", dies)
        with pytest.raises(OSError, match="disk full"):
            spread_weights(fresh()).save_pretrained(tmp_path, 200_000)
    assert same(PathoVLM.from_pretrained(tmp_path), model)


def test_saving_over_another_layout_leaves_nothing_stale(tmp_path):
    model = fresh()
    model.save_pretrained(tmp_path, 100_000)
    loaded = PathoVLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # over the files it was read from
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded.save_pretrained(tmp_path, 100_000)
    assert not (tmp_path / "model.safetensors").exists() and same(PathoVLM.from_pretrained(tmp_path), model)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
