"""Published safetensors files <-> PathoVLM: one file or shards with an index, either spelling of the names.

    python -m nanopatho.weights fetch Qwen/Qwen2.5-VL-3B-Instruct --to weights/Qwen2.5-VL-3B-Instruct
    python -m nanopatho.weights compare runs/demo/dapo --image tile.png      # ours beside transformers, fp32
    python -m nanopatho.weights bench /tmp/bench                             # memory and time of loading 3B

Source of the layout: the published Qwen2.5-VL repositories and what transformers 4.4x-5.x writes. Loading builds the
model without memory (meta device), compares every name and shape first, then reads one tensor at a time, so a 7B model
needs its own size and one tensor more. Needs safetensors and vlm.py; `compare` needs transformers (extra `parity`).
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .log import ConfigError, run_main
from .vlm import PathoVLM, parse_config

ONE_FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
            raise FileNotFoundError(f"{hint}, nor downloaded from the hub yet: run "
                                    f"`python -m nanopatho.weights fetch {folder}`") from error
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


def read_header(path: Path) -> dict[str, tuple]:
    """safetensors file -> {tensor: (dtype name, shape, first byte, bytes)}; no weights are read, nothing is run."""
    try:
        with safe_open(path, "pt"):  # checks the header, that tensors do not overlap, and the length of the file
            pass
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[:1] in (b"\x80", b"P") and start[8:] != b"{":  # how pickles and torch.save's zip files begin
            raise ValueError(f"{path}: a pickle under the name of safetensors. Those can run code, it was not opened; "
                             "fetch the safetensors file from its publisher") from error
        raise ValueError(f"{path}: damaged or cut off ({error}); fetch or train it again") from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return {name: (e["dtype"], tuple(e["shape"]), 8 + size + e["data_offsets"][0],
                   e["data_offsets"][1] - e["data_offsets"][0]) for name, e in entries.items()}


def tensor_files(folder: Path) -> dict[Path, dict[str, tuple]]:
    """The weight files of a folder with the header of each, checked against the index if any."""
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map")  # name -> file
        if not isinstance(listed, dict):
            raise ValueError(f"{folder / INDEX}: has no weight_map; fetch it again")
        files = sorted(set(listed.values()))
    else:
        listed, files = None, [ONE_FILE]
    absent = [name for name in files if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{folder}: missing {', '.join(absent)}; {listing(folder)}")
    held = {folder / name: read_header(folder / name) for name in files}
    if listed is not None:
        really = {(tensor, path.name) for path, tensors in held.items() for tensor in tensors}
        wrong = sorted(really ^ set(listed.items()))
        if wrong:
            raise ValueError(f"{folder / INDEX} and the files disagree about {len(wrong)} tensors: "
                             + ", ".join(f"{tensor} in {name}" for tensor, name in wrong[:20]))
    return held


def match(cls, folder: Path):
    """-> cls(config) on the meta device, [(file, header entry, published name)] in the order of the files.

    All name and shape errors come in one message, before a weight is read. A tied model may carry a redundant
    lm_head.weight: it is ignored. If the configuration does not say "tied", the files decide.
    """
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

    there = set(names)
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in there]
    problems += [f"{name} is there twice" for name in sorted({name for name in there if names.count(name) > 1})]
    problems += [f"{path.name} is there, but {INDEX} does not know it" for path in sorted(folder.glob("*.safetensors"))
                 if problems and path not in held]  # a whole part missing from the index: say so next to what it held
    places = []
    for path, tensors in held.items():
        for name, entry in tensors.items():
            target, (kind, shape, *_) = published_name(name), entry
            if target == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            if target not in wanted:
                problems.append(f"unexpected {name} {shape} in {path.name}")
            elif shape != wanted[target]:
                problems.append(f"{name} in {path.name} has shape {shape}, config.json asks for {wanted[target]}")
            elif kind not in DTYPES:
                problems.append(f"{name} in {path.name} is {kind}, not {', '.join(DTYPES)}: no quantised files")
            else:
                places.append((path, entry, target))
    if problems:
        raise ValueError(f"{folder}: {len(problems)} problems with the weights:\n  " + "\n  ".join(problems))
    return model, sorted(places, key=lambda place: (place[0], place[1][2]))


def read_into(file, start: int, room: memoryview):
    """Fill `room` from byte `start` of an unbuffered file; one system call gives 2 GB at most."""
    file.seek(start)
    while room:
        if not (got := file.readinto(room)):
            raise ValueError(f"{file.name}: ends {len(room)} bytes early; fetch it again")
        room = room[got:]


def load_vlm(cls, folder, dtype: torch.dtype | None, device):
    """-> cls(config) with the weights of `folder`; dtype None keeps each tensor's own.

    Bytes go from the file straight into the tensor: a memory map beside the copy would count twice in resident memory,
    and Python's buffer in between would cost a second copy.
    """
    folder = find_folder(folder)
    model, places = match(cls, folder)
    for path, group in itertools.groupby(places, key=lambda place: place[0]):
        with open(path, "rb", buffering=0) as file:
            for _, (kind, shape, start, size), target in group:
                raw = torch.empty(size, dtype=torch.uint8)
                read_into(file, start, memoryview(raw.numpy()))
                owner, leaf = target.rsplit(".", 1)
                tensor = raw.view(DTYPES[kind]).view(shape).to(device=device, dtype=dtype)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model


def save_vlm(model, folder, max_shard_bytes: int = 5_000_000_000):
    """Write config.json and the weights; the other files of a published folder are ChatTokenizer.save's."""
    write_folder(folder, {name: p.detach() for name, p in model.named_parameters()}, {CONFIG: config_json(model)},
                 max_shard_bytes)


def write_folder(folder, tensors: dict[str, torch.Tensor], texts: dict[str, dict], max_shard_bytes: int):
    """Write model.safetensors (shards and their index when larger than max_shard_bytes) and the JSON files `texts`.

    Everything is written under temporary names first and renamed at the end, weights before their index and what is
    stale removed last: a crash leaves an older save readable. Only one shard at a time is copied to main memory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
    if not one:
        texts = {INDEX: {"metadata": {"total_size": sum(p.nbytes for p in tensors.values())},
                         "weight_map": {name: file for file, names in files.items() for name in names}}, **texts}

    def temporary(name):
        return folder / f"{name}.partial"

    for file, names in files.items():
        held = {name: tensors[name].cpu().contiguous() for name in names}
        save_file(held, temporary(file), metadata={"format": "pt"})
        del held
    for file, content in texts.items():
        temporary(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in [*files, *texts]:
        os.replace(temporary(file), folder / file)
    for old in [folder / INDEX, folder / ONE_FILE, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in files and old.name not in texts:  # of an earlier save with another number of shards
            old.unlink(missing_ok=True)


def config_json(model) -> dict:
    """The flat published form of config.json."""
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": dtype,
            **model.config, "tie_word_embeddings": model.lm_head is None, "use_sliding_window": False}


# ---------------------------------------------------------------------------------------------------- commands


def fetch(name: str, to: str | None = None) -> Path:
    """Download the files of a hub id that this project reads -> their folder; the only function that uses the network.

    Called again it keeps finished files and goes on with the rest; a connection that breaks is taken up where it broke.
    """
    from huggingface_hub import HfApi, snapshot_download
    try:
        files = [file for file in HfApi().list_repo_files(name) if "/" not in file]
        weights = [file for file in files if file.endswith(".safetensors")]
        weights = weights or [file for file in files if file.endswith((".pt", ".bin"))]  # open_clip; old CLIP folders
        small = [file for file in files if file.endswith((".json", ".txt", ".jinja"))]
        folder = Path(snapshot_download(name, allow_patterns=weights + small, local_dir=to, max_workers=2))
    except Exception as error:  # of the hub, of its HTTP library, of the disk: no common class
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"fetch {name}: {type(error).__name__}: {reason} Check the id and the connection; a gated "
                          "model needs its licence accepted on its page and `hf auth login`") from error
    print(f"{folder}: {', '.join(sorted(weights))}")
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == "qwen2_5_vl":
        size = sum(entry[3] for _, entry, _ in match(PathoVLM, folder)[1])
        print(f"{size / 1e9:.2f} GB of weights: all names and shapes fit config.json")
    return folder


@torch.no_grad()
def compare(folder, images=(), question="What do you see?", new_tokens=32):
    """Ours beside transformers on one folder and prompt, fp32, CPU; prints a table -> {quantity: largest difference}.

    images: PIL images. Token ids are compared if the folder has a chat template. Both models are in memory: 8 bytes a
    parameter. Allowed differences are those of tests/test_vlm.py.
    """
    try:
        import transformers as ts
    except ImportError as error:
        raise ConfigError('compare needs transformers as the reference: pip install -e ".[parity]"') from error
    from .chat import IMAGE, ChatTokenizer, image_tokens, render, stream
    from .image import pixel_limits, qwen_pixels
    folder = find_folder(folder)
    ours, tokenizer = PathoVLM.from_pretrained(folder, dtype=torch.float32).eval(), ChatTokenizer.load(folder)
    reference = ts.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    limits = dict(zip(("min_pixels", "max_pixels"), pixel_limits(folder)))
    pixels, grid = qwen_pixels(images, **limits) if images else (None, None)
    counts = image_tokens(grid) if images else []
    ids, _ = render([{"role": "user", "content": IMAGE * len(counts) + question}], tokenizer, counts, kind="prompt")
    pairs, inputs = {}, dict(input_ids=torch.tensor([ids]))  # pairs: quantity -> ours, reference, allowed difference
    theirs = ts.AutoTokenizer.from_pretrained(folder)
    if theirs.chat_template:
        turn = {"role": "user", "content": [{"type": "image"}] * len(counts) + [{"type": "text", "text": question}]}
        text, each = theirs.apply_chat_template([turn], tokenize=False, add_generation_prompt=True), iter(counts)
        text = re.sub(r"<\|image_pad\|>", lambda mark: mark[0] * next(each), text)  # one mark a merged cell
        pairs["token ids"] = inputs["input_ids"][0], torch.tensor(theirs.encode(text, add_special_tokens=False)), 0
    if images:
        name = "Qwen2VLImageProcessor"  # the one that works with PIL: named so since 5.0
        processor = getattr(ts, name + "Pil" if hasattr(ts, name + "Pil") else name)(**limits)
        pairs["pixels"] = pixels, processor(list(images), return_tensors="pt")["pixel_values"], 2e-6
        seen = reference.model.visual(pixels, grid_thw=grid).pooler_output
        pairs["image features"] = ours.visual(pixels, grid), seen, 2e-5
        inputs.update(pixel_values=pixels, image_grid_thw=grid)
    more = dict(inputs, mm_token_type_ids=(inputs["input_ids"] == ours.config["image_token_id"]).int())
    pairs["logits"] = ours(**inputs), reference(**more).logits, 5e-5
    pairs["log-probabilities"] = *(x.log_softmax(-1) for x in pairs["logits"][:2]), 5e-5
    ends = dict(eos_token_id=list(tokenizer.eos_ids), pad_token_id=tokenizer.pad_id)
    reference.generation_config = ts.GenerationConfig(**ends)  # plain greedy, without the folder's own penalties
    written = reference.generate(**more, max_new_tokens=new_tokens, do_sample=False)[0, len(ids):]
    mine = torch.tensor(list(stream(ours, inputs["input_ids"], pixels, grid, ends, limit=new_tokens)))
    pairs["greedy tokens"] = mine, written, 0

    print(f"{'root mean square':20}{'ours':>12}{'reference':>12}{'largest difference':>22}{'allowed':>10}")
    differences = {}
    for name, (a, b, allowed) in pairs.items():
        differences[name] = (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("inf")
        values = "".join(f"{x.double().square().mean().sqrt().item():12.5f}" for x in (a, b))
        verdict = "" if differences[name] <= allowed else "   differs"
        print(f"{name:20}{values}{differences[name]:22.1e}{allowed:10.0e}{verdict}")
    print(f"ours:      {tokenizer.decode(mine)}\nreference: {tokenizer.decode(written)}")
    return differences


def bench(folder, preset: str):
    """Write a random bf16 checkpoint of a preset's size, then measure loading it in a process of its own."""
    from .presets import VLM
    folder = Path(folder)
    with torch.device("meta"):
        model = PathoVLM(VLM[preset]).bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < 1.2 * size:
        raise ConfigError(f"{folder}: {free / 1e9:.1f} GB free, the checkpoint takes {size / 1e9:.1f} GB")
    noise = torch.randn(200_000, dtype=torch.bfloat16)  # row r of a matrix is noise[r:], written out shard by shard
    tensors = {name: noise.as_strided(p.shape, [1] * p.ndim) if p.ndim > 1 else noise[:len(p)].clone()
               for name, p in model.named_parameters()}
    write_folder(folder, tensors, {CONFIG: config_json(model)}, 1_000_000_000)
    code = "import sys; from nanopatho.weights import measure; measure(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    print(f"{folder} can be removed now")


def measure(folder):
    """Print what plain reading and loading take, both from disk, and this process's peak memory. Linux.

    Reading is timed twice: into one small buffer, and into new memory of the files' size, which every program that
    keeps the weights must touch for the first time. Where that is slow (a virtual machine that fetches it from its
    host) it, and not the loader, is the limit.
    """
    files, seconds = sorted(Path(folder).glob("*.safetensors")), []

    def read(room_for):
        for path in files:
            with open(path, "rb", buffering=0) as file:
                for start in range(0, size := path.stat().st_size, 1 << 24):
                    read_into(file, start, room_for(min(1 << 24, size - start)))

    block, kept = memoryview(bytearray(1 << 24)), []

    def keep(size):
        kept.append(torch.empty(size, dtype=torch.uint8))
        return memoryview(kept[-1].numpy())

    for task in (lambda: read(lambda size: block[:size]), lambda: read(keep), lambda: PathoVLM.from_pretrained(folder)):
        for path in files:  # the system is asked to forget its copy of the files
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - begin)
        kept.clear()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # Linux; of this process
    size, (bare, fresh, load) = sum(path.stat().st_size for path in files), seconds
    print(f"{size / 1e9:.2f} GB, {len(files)} files; peak memory {peak / 1e9:.2f} GB = {peak / size:.3f} x the files\n"
          f"reading {bare:.1f} s, into new memory {fresh:.1f} s; loading {load:.1f} s = "
          f"{load / bare:.2f} x and {load / fresh:.2f} x")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fetch", help="download published weights")
    one.add_argument("id", help="hub id, for example Qwen/Qwen2.5-VL-7B-Instruct")
    one.add_argument("--to", help="folder; default: the hub's cache, where --init and --model find the id")
    one = commands.add_parser("compare", help="our numbers beside those of transformers")
    one.add_argument("model", help="folder of weights")
    one.add_argument("--image", nargs="*", default=[])
    one.add_argument("--question", default="What do you see?")
    one = commands.add_parser("bench", help="write a random checkpoint and measure loading it")
    one.add_argument("folder", help="a new folder")
    one.add_argument("--preset", default="3b")
    c = parser.parse_args(argv)
    if c.command == "fetch":
        fetch(c.id, c.to)
    elif c.command == "bench":
        bench(c.folder, c.preset)
    else:
        from .checkpoint import reading
        from .image import open_image
        with reading(c.model, "compare"):
            compare(c.model, [open_image(path) for path in c.image], c.question)


if __name__ == "__main__":
    run_main(main)
