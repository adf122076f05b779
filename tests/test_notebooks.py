"""The notebooks: what is committed is in order and not stale (always); every one runs, and every exercise tells right
from wrong (with the extra `notebooks`)."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

PAGES = run.notebooks()
assert PAGES, f"no notebook in {FOLDER}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_what_is_committed_is_in_order(path):
    assert run.problems(path) == []


def page():
    """The smallest notebook without a problem."""
    code = lambda source, n: dict(cell_type="code", source=source, execution_count=n, outputs=[], metadata={})
    fold = dict(cell_type="markdown", source="<details>\n\n```python\nx = 2\n```\n</details>", metadata={})
    cells = [code("x = ...\ncheck(lambda: x == 2)", 1), fold, code("y = 1\ncheck(lambda: y)", 2), copy.copy(fold)]
    notebook = dict(cells=cells, metadata=dict(kernelspec=dict(name="python3")), nbformat=4, nbformat_minor=5)
    notebook["metadata"]["nanopatho"] = dict(source=run.source_hash(notebook))
    return notebook


def printed(text):
    return lambda n: n["cells"][0]["outputs"].append(dict(output_type="stream", name="stdout", text=text))


@pytest.mark.parametrize("spoil, told", [
    (lambda n: None, None),
    (lambda n: n["cells"][0].update(source="x = 3\ncheck(lambda: x == 2)"), "older than the cells"),
    (lambda n: n["cells"].reverse(), "older than the cells"),
    (lambda n: n["cells"][2].update(execution_count=7), "from top to bottom"),
    (lambda n: n["cells"][0].update(execution_count=None), "from top to bottom"),
    (lambda n: n["metadata"]["kernelspec"].update(name="my-env"), "must be python3"),
    (lambda n: n["metadata"].update(widgets={}), "widget state"),
    (lambda n: n["cells"][0]["outputs"].append(dict(output_type="error", ename="KeyError", evalue="a")), "KeyError"),
    (lambda n: n["cells"][0]["outputs"].append(dict(output_type="display_data", data={"image/png": "/tmp/abc"})), None),
    (lambda n: n["cells"].pop(), "no folded solution"),
    (lambda n: n["cells"][0].update(source="x = 1"), "1 exercises"),
    (printed("/home/me/x.png"), "/home/me"), (printed("C:\\Users\\me"), "C:"), (printed("see runs/tmp/x, 3/4"), None),
    (printed("x" * 400_000), "bytes"), (printed(f"{run.SMOKE}: noise"), "smoke model"),
])
def test_each_fault_is_told(tmp_path, spoil, told):
    notebook = page()
    spoil(notebook)
    (tmp_path / "01.ipynb").write_text(json.dumps(notebook))
    found = run.problems(tmp_path / "01.ipynb")
    assert any(told in problem for problem in found) if told else found == []


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke model for all notebooks, trained as they would do it."""
    for name in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(name, reason="needs the extra: pip install -e '.[notebooks]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOPATHO_SMOKE", "1")
        patch.setenv("NANOPATHO_SMOKE_RUNS", str(tmp_path_factory.mktemp("smoke")))
        patch.setenv("OMP_NUM_THREADS", "1")
        subprocess.run([sys.executable, "-c", "import helpers; helpers.model_folders()"], cwd=FOLDER, check=True)
        yield


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_runs_from_top_to_bottom_and_its_solutions_are_right(path, smoke):
    tasks = run.exercises(json.loads(path.read_text(encoding="utf-8")))
    done = run.execute(path, solve=True)
    checks = {source for _, source, _ in tasks}
    last = [[o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"][-1].splitlines()[-1]
            for cell in done.cells if cell.source in checks]
    assert [line.split(" (")[0] for line in last] == ["not yet", "right"] * len(tasks)
