"""One dial for size: `--preset smoke|tiny|small|3b|7b` (and clip-b16, clip-l14), and the command line of the four scripts.

A preset is three plain dicts: the model (the published config.json, as a dict), and the training fields of each stage. The model
of `tiny` is the real architecture with small numbers; there is no second model. Order of precedence, lowest first:
the dataclass in the script, the preset, the command line.

Sources: config.json of Qwen2.5-VL-3B/7B-Instruct and of OpenAI's CLIP ViT-B/16 and ViT-L/14. Patho-R1 publishes no
hyper-parameters for any stage (arXiv 2505.11404, repository Wenchuan-Zhang/Patho-R1): the large presets carry our defaults,
reasoned in the README's table of departures; the tiny ones were measured on the micro-world (docs/LOG.md).
"""
import argparse
import dataclasses
import importlib.util
import sys


def _qwen(hidden, layers, heads, kv_heads, inter, vocab, tie, vision, mrope, special=None, std=0.02):
    """The flat config.json that Qwen2.5-VL was published with."""
    special = special or dict(bos_token_id=151643, eos_token_id=151645, vision_start_token_id=151652,
                              vision_end_token_id=151653, vision_token_id=151654, image_token_id=151655,
                              video_token_id=151656)
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_size=hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inter,
        vocab_size=vocab, tie_word_embeddings=tie, rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu",
        rope_scaling=dict(type="mrope", mrope_section=mrope), max_position_embeddings=128000, attention_dropout=0.0,
        initializer_range=std, use_sliding_window=False, torch_dtype="bfloat16",
        vision_config=dict(dict(model_type="qwen2_5_vl", in_chans=3, patch_size=14, spatial_patch_size=14,
                                spatial_merge_size=2, temporal_patch_size=2, tokens_per_second=2, hidden_act="silu",
                                out_hidden_size=hidden), **vision), **special)


# The small tokenizers are trained on the micro-world (chat.train_tokenizer): the merges come first, the special tokens
# follow in Qwen's order, so their ids start at TINY_BPE and `vocab_size` leaves no unused row.
TINY_BPE = 1002
_tiny_ids = dict(bos_token_id=TINY_BPE, eos_token_id=TINY_BPE + 2, vision_start_token_id=TINY_BPE + 9,
                 vision_end_token_id=TINY_BPE + 10, vision_token_id=TINY_BPE + 11, image_token_id=TINY_BPE + 12,
                 video_token_id=TINY_BPE + 13)
_big_vision = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, window_size=112,
                   fullatt_block_indexes=[7, 15, 23, 31])
_tiny_vision = dict(depth=3, hidden_size=128, num_heads=4, intermediate_size=512, window_size=56,
                    fullatt_block_indexes=[1])
VLM = {
    "smoke": _qwen(64, 2, 4, 2, 128, TINY_BPE + 22, True,
                   dict(_tiny_vision, depth=2, hidden_size=64, num_heads=2, intermediate_size=128,
                        fullatt_block_indexes=[1]), [2, 3, 3], _tiny_ids),
    "tiny": _qwen(128, 3, 4, 2, 384, TINY_BPE + 22, True, _tiny_vision, [4, 6, 6], _tiny_ids, std=0.06),
    "small": _qwen(384, 8, 6, 2, 1024, TINY_BPE + 22, True,
                   dict(_tiny_vision, depth=8, hidden_size=320, num_heads=5, intermediate_size=864,
                        fullatt_block_indexes=[3, 7]), [8, 12, 12], _tiny_ids, std=0.035),
    "3b": _qwen(2048, 36, 16, 2, 11008, 151936, True, _big_vision, [16, 24, 24]),
    "7b": _qwen(3584, 28, 28, 4, 18944, 152064, False, _big_vision, [16, 24, 24]),
}


def _clip(image, patch, v_width, v_layers, v_heads, t_width, t_layers, t_heads, embed, vocab=49408, context=77,
          act="quick_gelu"):
    """Hugging Face's CLIPConfig as a dict; quick_gelu because OpenAI trained with it (the state dict does not tell)."""
    return dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=embed, logit_scale_init_value=2.6592,
        vision_config=dict(model_type="clip_vision_model", image_size=image, patch_size=patch, hidden_size=v_width,
                           num_hidden_layers=v_layers, num_attention_heads=v_heads, intermediate_size=4 * v_width,
                           num_channels=3, hidden_act=act, layer_norm_eps=1e-5, projection_dim=embed),
        text_config=dict(model_type="clip_text_model", vocab_size=vocab, hidden_size=t_width,
                         num_hidden_layers=t_layers, num_attention_heads=t_heads, intermediate_size=4 * t_width,
                         max_position_embeddings=context, hidden_act=act, layer_norm_eps=1e-5, projection_dim=embed,
                         bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=0))


CLIP = {
    "smoke": _clip(112, 14, 64, 2, 2, 64, 1, 2, 64, vocab=1024, context=48),
    "tiny": _clip(112, 14, 128, 4, 4, 128, 3, 4, 128, vocab=1024, context=48),
    "small": _clip(224, 14, 384, 8, 6, 256, 6, 4, 256, vocab=2048, context=77),
    "clip-b16": _clip(224, 16, 768, 12, 12, 512, 12, 8, 512),
    "clip-l14": _clip(224, 14, 1024, 24, 16, 768, 12, 12, 768),
}

# Training fields that differ from the dataclass defaults in the scripts. The dataclass defaults are the full-size ones.
_smoke_common = dict(save_every=0, threads=1)
TRAIN = {
    "smoke": {
        "clip": dict(_smoke_common, workers=0, batch_size=16, steps_morphology=2, steps_all=2, lr=1e-3),
        "pretrain": dict(_smoke_common, workers=0, batch_size=8, steps=3, lr=1e-3, warmup=1),
        "sft": dict(_smoke_common, workers=0, batch_size=8, steps=3, lr=1e-3, warmup=1, eval_samples=2, eval_items=8),
        "rl": dict(_smoke_common, prompts=2, steps=2, lr=1e-4, warmup=1, max_new_tokens=16, eval_samples=2,
                   eval_items=8, max_rounds=2),
    },
    # tiny starts from random weights: Muon, and a learning rate a thousand times that of fine-tuning published ones.
    "tiny": {
        "clip": dict(optimizer="muon", batch_size=64, lr=2e-3, warmup=20, weight_decay=0.05, steps_morphology=250,
                     steps_all=300, partial=0.7, stain=0.2, save_every=100, workers=0),
        "pretrain": dict(optimizer="muon", batch_size=32, lr=2e-3, warmup=50, steps=850, save_every=250, workers=0),
        "sft": dict(optimizer="muon", train="projector,decoder", batch_size=16, lr=2e-3, warmup=20, steps=800,
                    save_every=200, max_new_tokens=64, eval_sample_items=300, workers=0),
        "rl": dict(lr=1e-4, warmup=5, decay=0.5, weight_decay=0.0, prompts=16, steps=120, max_new_tokens=64, micro_batch=128,
                   eval_sample_items=300),
    },
    # small: for one GPU, 224 x 224 pixels. Steps and rates are scaled from tiny; run in part on a CPU only (docs/LOG.md).
    "small": {
        "clip": dict(optimizer="muon", batch_size=256, lr=1e-3, warmup=50, weight_decay=0.05, steps_morphology=700,
                     steps_all=800, partial=0.7, stain=0.2, workers=8),
        "pretrain": dict(optimizer="muon", batch_size=128, micro_batch=64, lr=2e-3, warmup=50, steps=1500,
                         max_pixels=224 * 224, workers=8),
        "sft": dict(optimizer="muon", train="projector,decoder", batch_size=64, lr=2e-3, warmup=50, steps=1200,
                    max_pixels=224 * 224, max_new_tokens=192, eval_sample_items=300, workers=8),
        "rl": dict(lr=5e-5, warmup=5, decay=0.5, weight_decay=0.0, prompts=64, steps=50, max_new_tokens=192,
                   micro_batch=128, max_pixels=224 * 224, eval_sample_items=300),
    },
    # Full size: activations, not weights, decide what fits (`--dry-run` shows it), so blocks are recomputed in small passes.
    **{size: {"pretrain": dict(recompute=True, micro_batch=2, max_skipped=5), "sft": dict(recompute=True, micro_batch=2, max_skipped=5),
              "rl": dict(recompute=True, micro_batch=8, max_skipped=5)} for size in ("3b", "7b")},
    "clip-b16": {}, "clip-l14": {},
}


def _bool(text):
    if text.lower() in ("on", "true", "yes", "1"):
        return True
    if text.lower() in ("off", "false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither on nor off")


PUBLISHED = ("3b", "7b", "clip-b16", "clip-l14")          # sizes that start from published weights and their tokenizer


def parse(Config, stage, argv=None):
    """Command line -> Config instance. Every dataclass field is an option `--name value`, its metadata["help"] the help.

    >>> # python train_sft.py --preset tiny --lr 5e-4     dataclass default < TRAIN["tiny"]["sft"] < --lr
    Unknown presets and fields end the program with the list of known ones (exit code 2), before anything is read; so do
    values out of range: a number below metadata["least"] (0 if not given), a name not among metadata["parts"]; a package
    named as a value that is not installed (metadata["extra"]: the extra that brings it). With
    --dry-run the plan of the run (plan.py) is printed and the program ends (exit code 0).
    """
    argv = sys.argv[1:] if argv is None else argv
    known = list(CLIP if stage == "clip" else VLM)
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = dataclasses.fields(Config)
    for f in fields:
        kind = _bool if f.type in (bool, "bool") else {"int": int, "float": float}.get(f.type, f.type)
        kind = str if kind == "str" else kind
        parser.add_argument(f"--{f.name}", type=kind, metavar=getattr(f.type, "__name__", str(f.type)),
                            choices=f.metadata.get("choices"),
                            help=f"{f.metadata.get('help', '')} (default: {f.default})")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory per GPU and tensor names")
    parser.add_argument("--world", type=int, default=1, metavar="int", help="GPUs --dry-run reckons with (default: 1)")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    dry_run, world = given.pop("dry_run"), given.pop("world")
    if world < 1:
        parser.error(f"--world {world}: must be 1 or more")
    preset = given.get("preset", next(f.default for f in fields if f.name == "preset"))
    if preset not in known:
        parser.error(f"unknown preset '{preset}': choose one of {', '.join(known)}")
    fields_of_preset = TRAIN[preset].get(stage, {})
    unknown = set(fields_of_preset) - {f.name for f in fields}
    assert not unknown, f"presets.TRAIN['{preset}']['{stage}'] names fields the script does not have: {sorted(unknown)}"
    for f in fields:
        value = given.get(f.name, f.default)
        least, parts = f.metadata.get("least", 0), f.metadata.get("parts")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value < float("inf"):
            parser.error(f"--{f.name} {value}: must be {least} or more")
        if parts and not set(str(value).split(",")) <= set(parts):
            parser.error(f"--{f.name} {value}: choose from {', '.join(parts)}, joined by commas")
        if f.metadata.get("extra") and value != f.default and not importlib.util.find_spec(value):
            parser.error(f"--{f.name} {value}: {value} is not installed; pip install -e \".[{f.metadata['extra']}]\"")
    if dry_run:
        from .plan import describe
        try:
            text = describe(Config(**{**fields_of_preset, **given}), stage, world)
        except (ValueError, OSError) as error:                       # --init that does not fit
            parser.error(str(error))
        print(text)
        parser.exit()
    if preset in PUBLISHED and "init" in {f.name for f in fields} and not given.get("init"):
        parser.error(f"--preset {preset} needs --init FOLDER: published sizes start from published weights (config.json, "
                     "model.safetensors, tokenizer.json), not from random ones")
    return Config(**{**fields_of_preset, **given})
