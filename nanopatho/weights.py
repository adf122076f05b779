"""Published safetensors files <-> PathoVLM: one file or shards with an index, either spelling of the names.

Source of the layout: the published Qwen2.5-VL repositories and what transformers 4.4x-5.x writes. Loading builds the
model without memory (meta device), compares every name and shape first, then moves one tensor at a time, so a 7B model
needs its own size and one tensor more. Needs safetensors and vlm.py.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .vlm import parse_config

ONE_FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def published_name(name: str) -> str:
    """Spelling of newer transformers -> as published: model.language_model.norm.weight -> model.norm.weight."""
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


def find_folder(folder: str | Path) -> Path:
    """A folder, or a hub id ("Qwen/Qwen2.5-VL-3B-Instruct") that was downloaded before. Never downloads."""
    if Path(folder).is_dir():
        return Path(folder)
    hint = f"{folder}: no such folder"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import LocalEntryNotFoundError
        except ImportError as error:
            raise FileNotFoundError(f"{hint}; to use it as a hub id: pip install huggingface-hub") from error
        try:
            return Path(snapshot_download(str(folder), local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(f"{hint}, nor downloaded from the hub yet: run `hf download {folder}`") from error
    raise FileNotFoundError(hint)


def listing(folder: Path) -> str:
    return f"the folder holds {sorted(p.name for p in folder.iterdir())}"


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{path}: holds a {type(data).__name__}, a JSON object is needed")
        return data
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing; {listing(path.parent)}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def tensor_files(folder: Path) -> dict[Path, list[str]]:
    """The weight files of a folder and the tensor names each really holds, checked against the index if any."""
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX)["weight_map"]  # name -> file
        files = sorted(set(listed.values()))
    else:
        listed, files = None, [ONE_FILE]
    absent = [name for name in files if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{folder}: missing {', '.join(absent)}; {listing(folder)}")
    held = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as file:
                held[folder / name] = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged or cut off ({error}); fetch or train it again") from error
    if listed is not None:
        really = {(tensor, path.name) for path, tensors in held.items() for tensor in tensors}
        wrong = sorted(really ^ set(listed.items()))
        if wrong:
            raise ValueError(f"{folder / INDEX} and the files disagree about {len(wrong)} tensors: "
                             + ", ".join(f"{tensor} in {name}" for tensor, name in wrong[:20]))
    return held


def load_vlm(cls, folder, dtype: torch.dtype | None, device):
    """-> cls(config) with the weights of `folder`; dtype None keeps each tensor's own.

    All name and shape errors come in one message. A tied model may carry a redundant lm_head.weight: it is ignored. If
    the configuration does not say "tied", the files decide.
    """
    folder = find_folder(folder)
    try:
        config = parse_config(read_json(folder / CONFIG))
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder / CONFIG}: {error}") from error
    held = tensor_files(folder)
    names = [published_name(name) for tensors in held.values() for name in tensors]
    if config["tie_word_embeddings"] is None:
        config["tie_word_embeddings"] = "lm_head.weight" not in names
    with torch.device("meta"):
        model = cls(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}

    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in names]
    problems += [f"{name} is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    places = []  # (file, name in the file, published name)
    for path, tensors in held.items():
        with safe_open(path, "pt") as file:
            for name in tensors:
                target = published_name(name)
                if target == "lm_head.weight" and config["tie_word_embeddings"]:
                    continue
                shape = tuple(file.get_slice(name).get_shape())
                if target not in wanted:
                    problems.append(f"unexpected {name} {shape} in {path.name}")
                elif shape != wanted[target]:
                    problems.append(f"{name} in {path.name} has shape {shape}, config.json asks for {wanted[target]}")
                else:
                    places.append((path, name, target))
    if problems:
        raise ValueError(f"{folder}: {len(problems)} problems with the weights:\n  " + "\n  ".join(problems))

    for path in held:
        with safe_open(path, "pt") as file:
            for name, target in ((n, t) for p, n, t in places if p == path):
                # copy=True: without it a tensor of the right dtype would stay a view into the file on disk
                tensor = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
                owner, leaf = target.rsplit(".", 1)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model


def save_vlm(model, folder, max_shard_bytes: int = 5_000_000_000):
    """Write config.json and model.safetensors (shards and their index when larger than max_shard_bytes).

    Everything is written under temporary names first and renamed at the end: a crash while writing leaves an older save
    untouched. Tokenizer and preprocessor files are the caller's to copy.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    shards, room = [[]], max_shard_bytes
    for name, p in tensors.items():
        if shards[-1] and p.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= p.nbytes
    one = len(shards) == 1
    files = {ONE_FILE if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
             for i, names in enumerate(shards, 1)}
    texts = {CONFIG: config_json(model)}
    if not one:
        texts[INDEX] = {"metadata": {"total_size": sum(p.nbytes for p in tensors.values())},
                        "weight_map": {name: file for file, names in files.items() for name in names}}

    def temporary(name):
        return folder / f"{name}.partial"

    for file, names in files.items():
        held = {name: tensors[name].cpu().contiguous() for name in names}
        save_file(held, temporary(file), metadata={"format": "pt"})
    for file, content in texts.items():
        temporary(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / ONE_FILE, folder / INDEX]:
        if old.name not in files and old.name not in texts:  # of an earlier save with another number of shards
            old.unlink(missing_ok=True)
    for file in [*files, *texts]:
        os.replace(temporary(file), folder / file)


def config_json(model) -> dict:
    """The flat published form of config.json."""
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": dtype,
            **model.config, "tie_word_embeddings": model.lm_head is None, "use_sliding_window": False}
