# `make demo`, `make report` and `make test` set up what they need, in a virtual environment of their own.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# 3 images of each class: three minutes of sampling on two cores that compute in float32.
DEMO = --model mar_tiny --num_images 30 --eval_bsz 15
REPORT = --models mar_tiny --num_images 80 --eval_bsz 20 --device cpu \
	--method mar lazymar lazymar+gtr fast

.PHONY: demo report test lint install clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt -r requirements-dev.txt
	touch $@

# mar_tiny, the baseline and LazyMAR, from the same seeds.
demo: install
	$(RUN) eval.py $(DEMO) --output_dir output/demo/baseline
	$(RUN) eval.py $(DEMO) --output_dir output/demo/lazymar --lazy_mar
	$(RUN) compare.py output/demo/baseline output/demo/lazymar --output output/demo/side_by_side.png

# The paper's table, methods and ablations as far as mar_tiny goes, and the page, output/reproduce/report.html: sized for
# two cores and a quarter of an hour. For other models, or on GPUs, run reproduce.py by hand with another --output_dir.
report: install
	OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --nproc_per_node=2 reproduce.py $(REPORT)

# Two workers with a thread each: most tests are too small for two threads to help. In order, no long test comes last.
test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV)
