"""Run the notebooks from top to bottom and write their outputs into them, or look whether that was done.

    python notebooks/run.py                  # those whose cells changed since their outputs were made
    python notebooks/run.py --all            # every one
    python notebooks/run.py --check          # run nothing: only look, exit code 1 if something is wrong

Outputs are committed, so that the pages can be read without running anything. Each notebook carries a hash of its cells
from the moment it was run (metadata "nanopatho"); `problems` tells stale outputs from it without running. Only
`execute` needs nbclient (the extra `notebooks`); looking needs the standard library.
"""
import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIMIT = 400_000                          # bytes a file: more is slow to open on a web page
SECONDS = 300                            # a cell; none takes 10 on two idle cores, but machines are shared
SMOKE = "A SMOKE MODEL"                  # how helpers.model_folders says that a model has learned nothing
# Paths that exist on one machine only. A slash before it would be a part of a longer, relative path.
ABSOLUTE = re.compile(r"(?<![\w./:])(/(?:home|root|Users|tmp|var|work|opt|usr|mnt|private)/[\w.]+)|[A-Z]:\\\\\w")


def notebooks():
    return sorted(FOLDER.glob("*.ipynb"))


def text(cell):
    """A cell's source or an output's text: one string or a list of lines, as the format allows."""
    return cell if isinstance(cell, str) else "".join(cell)


def source_hash(notebook):
    """sha256 over kind and source of all cells, in order: it changes iff a cell does."""
    cells = [[cell["cell_type"], text(cell["source"])] for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def exercises(notebook):
    """-> [(number of the cell that checks, its source, the folded solution's code)]. The solution is the ```python
    block of the first <details> behind a code cell with a line that begins with check( ."""
    found, waiting = [], None
    for number, cell in enumerate(notebook["cells"]):
        source = text(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^check\(", source, re.M):
            waiting = number, source
        elif waiting and "<details>" in source:
            block = re.search(r"```python\n(.*?)```", source, re.S)
            found.append((*waiting, block[1] if block else ""))
            waiting = None
    if waiting:
        found.append((*waiting, ""))
    return found


def problems(path):
    """-> what is wrong with a committed notebook, in words; [] if nothing is."""
    raw, wrong = path.read_text(encoding="utf-8"), []
    notebook = json.loads(raw)
    meta, code = notebook["metadata"], [c for c in notebook["cells"] if c["cell_type"] == "code"]
    if len(raw.encode()) > LIMIT:
        wrong.append(f"{len(raw.encode()):,} bytes, the limit is {LIMIT:,}: smaller or fewer plots")
    if not code:
        wrong.append("no code cell")
    if meta.get("kernelspec", {}).get("name") != "python3":
        wrong.append(f"kernelspec {meta.get('kernelspec')}: its name must be python3")
    if "widgets" in meta:
        wrong.append("widget state in the metadata: a web page cannot show it")
    if [c["execution_count"] for c in code] != list(range(1, len(code) + 1)):
        wrong.append("the cells were not run once each from top to bottom: run notebooks/run.py")
    if meta.get("nanopatho", {}).get("source") != source_hash(notebook):
        wrong.append("the outputs are older than the cells: run notebooks/run.py")
    for number, cell in enumerate(code, 1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                wrong.append(f"code cell {number} ended in {output['ename']}: {output['evalue']}")
            if SMOKE in text(output.get("text", "")):
                wrong.append(f"code cell {number} used a smoke model: make demo, then run.py without NANOPATHO_SMOKE")
            if any("widget" in kind for kind in output.get("data", {})):
                wrong.append(f"code cell {number} shows a widget, which a web page cannot")
    for match in ABSOLUTE.finditer(re.sub(r'"image/(png|jpeg)": "[^"]*"', "", raw)):
        wrong.append(f"the path {match[0]} exists on one machine only")
    tasks = exercises(notebook)
    if not 2 <= len(tasks) <= 4:
        wrong.append(f"{len(tasks)} exercises (a cell with check(, then a solution in <details>); wanted are 2 to 4")
    wrong += [f"cell {number}: no folded solution in a ```python block" for number, _, code in tasks if not code]
    return wrong


def execute(path, solve=False):
    """Run a notebook in a fresh kernel, in its own folder -> the notebook with outputs. A failing cell raises.

    solve: behind each exercise its folded solution and its check run too, as two more cells.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing: pip install -e '.[notebooks]'") from error
    notebook = nbformat.read(path, as_version=4)
    if solve:
        for number, source, solution in reversed(exercises(notebook)):
            notebook.cells[number + 1:number + 1] = [nbformat.v4.new_code_cell(s) for s in (solution, source)]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    here = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=here).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs):
    """Neighbouring pieces of one stream as one: when the machine is busy, a single print may arrive in two."""
    out = []
    for output in outputs:
        if out and all(o.output_type == "stream" and o.name == output.get("name") for o in (out[-1], output)):
            out[-1].text += output.text
        else:
            out.append(output)
    return out


def tidy(notebook):
    """Leave in the file only what a reader needs and what is the same at every run: no times, no random cell names."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}, "nanopatho": {"source": source_hash(notebook)}}
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = {}, f"cell-{number:02d}"
    return notebook


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks to run, such as 08 (default: those with stale outputs)")
    parser.add_argument("--all", action="store_true", help="run every one")
    parser.add_argument("--check", action="store_true", help="run nothing, only look")
    args = parser.parse_args(argv)
    paths = [p for p in notebooks() if not args.names or p.name.startswith(tuple(args.names))]
    if not paths:
        raise SystemExit(f"no notebook {' or '.join(args.names)} in {FOLDER}")
    if not args.check:
        import nbformat
        for path in paths:
            stale = json.loads(path.read_text(encoding="utf-8"))
            if args.all or args.names or stale["metadata"].get("nanopatho", {}).get("source") != source_hash(stale):
                print(f"{path.name}: running", flush=True)
                nbformat.write(tidy(execute(path)), path)
    wrong = [f"{path.name}: {problem}" for path in paths for problem in problems(path)]
    print("\n".join(wrong) or f"{len(paths)} notebooks are in order")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
