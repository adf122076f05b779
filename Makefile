# make demo   the whole of Patho-R1 in miniature, then open runs/demo/report.html
# make test   the tests
# make small  the small preset on one GPU: 224-pixel pictures, all 60 cells
# make study  three seeds and the ablations; make notebooks runs them and writes their outputs; make bench times kernels and training steps (CUDA)
# Both set up .venv by themselves. A machine with CUDA: make demo TORCH="torch" uses the newest build.
VENV  ?= .venv
TORCH ?= torch==2.13.0 triton==3.6.0 "numpy<2.4"
PY     = OMP_WAIT_POLICY=passive $(VENV)/bin/python

.PHONY: demo small study test notebooks bench clean
demo: $(VENV)/.ok
	$(PY) -m nanopatho.study demo --preset tiny --out runs/demo

small: $(VENV)/.ok
	$(PY) -m nanopatho.study demo --preset small --out runs/small

study: $(VENV)/.ok
	$(PY) -m nanopatho.study study --preset tiny --out runs/study

test: $(VENV)/.ok
	OMP_NUM_THREADS=1 $(PY) -m pytest tests

notebooks: $(VENV)/.ok
	$(PY) notebooks/run.py --all

bench: $(VENV)/.ok
	$(VENV)/bin/python -m pip install -q -e ".[bench]"
	$(PY) -m kernels.bench
	$(PY) -m nanopatho.bench_train vlm --preset 3b
	$(PY) -m nanopatho.bench_train clip --preset clip-l14

$(VENV)/.ok: pyproject.toml
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH) -e ".[dev,parity,data,notebooks]"
	touch $@

clean:
	rm -rf runs data/smoke data/tiny
