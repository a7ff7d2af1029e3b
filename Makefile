# make demo   learn one person from a photo and draw them; installs what it needs into .venv
# make studio  people and pictures in the browser, on the mini, with two drawn people to try
#             (STUDIO_OUT is where they are kept)
# make lint   ruff and the type checker; adds the test requirements to the same .venv
# make test   lint and test
# make test-long  the tests that take minutes each: whole trainings and tables of the mini
# make chaos  trainings of many people are killed, their files damaged, their disk filled
# make slow   the tests that need about 10 GB of memory
# make results  the profiles side by side on twenty people of the mini, and the parts of the method one by
#             one on ten, to docs/results.md; the same command goes on where it was stopped (RESULTS_OUT,
#             RESULTS_PEOPLE, RESULTS_METHODS, RESULTS_PARTS, RESULTS_PARTS_PEOPLE)
# make bench  times this project and PyTorch side by side, 40 minutes on two cores (an estimate),
#             and ends with the five lines that a user would want to know;
#             see docs/performance.md for the parts, for other workloads and for BENCH_OUT

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_OUT ?= outputs/benchmarks
STUDIO_OUT ?= outputs/studio
RESULTS_OUT ?= outputs/results
RESULTS_FILE ?= docs/results.md
RESULTS_PEOPLE ?= 20
RESULTS_METHODS ?= paper,paper@steps=0,paper@id_strength=0,paper@steps=0;id_strength=0,paper_alone,paper_alone@id_strength=1.25,paper_alone@id_strength=1.5,official,cross_init,textual_inversion
RESULTS_PARTS_PEOPLE ?= 10
RESULTS_PARTS ?= paper@photos=1,paper@photos=1;steps=0,paper@photos=1;steps=5,paper@photos=1;steps=10,paper@photos=1;steps=80,paper@photos=1;steps=320,paper@photos=3,paper@photos=5,paper@photos=5;steps=0,paper@photos=1;kv=none,paper@photos=1;kv=full,paper@photos=1;token_basis=none,paper@photos=1;token_basis=none;regulariser=none,paper@photos=1;regulariser=truncated,paper@photos=1;id_strength=0,paper@photos=1;id_strength=0.5,paper@photos=1;id_strength=1.5,paper_alone@photos=1;steps=80,paper_alone@photos=1;steps=80;n_pseudo_tokens=1

.PHONY: demo studio lint test test-long chaos slow results bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m idea_jax.demo

studio: $(VENV)/.installed-studio
	test -d $(STUDIO_OUT)/people/photos || \
	  $(BIN)/python -m idea_jax.mini.album $(STUDIO_OUT)/people --people 2 --photos 2
	$(BIN)/python -m idea_jax.studio --pretrained_model_name_or_path mini --guidance_scale 3 \
	  --data $(STUDIO_OUT)/data --examples $(STUDIO_OUT)/people/photos --open

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-long: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m long

chaos: $(VENV)/.installed-test
	timeout 600 $(BIN)/python -m pytest -m chaos -n 0 -s

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow -n 0

# $(1): name of the evaluation; $(2): its methods; $(3): how many people; $(4): photos of each;
# $(5): drawings of a prompt
define evaluate
	$(BIN)/python -m idea_jax.mini.album $(RESULTS_OUT)/people-$(1) --people $(3) --photos $(4)
	$(BIN)/python -m idea_jax.evaluate --compare "$(2)" \
	  --pretrained_model_name_or_path mini --prompts mini --score_crop center --guidance_scale 3 --pictures $(5) \
	  --photos $(RESULTS_OUT)/people-$(1)/photos --held_out $(RESULTS_OUT)/people-$(1)/held_out \
	  --output_dir $(RESULTS_OUT)/$(1)
endef

results: $(VENV)/.installed
	$(call evaluate,profiles,$(RESULTS_METHODS),$(RESULTS_PEOPLE),1,2)
	$(call evaluate,parts,$(RESULTS_PARTS),$(RESULTS_PARTS_PEOPLE),5,1)
	$(BIN)/python -m idea_jax.mini.results $(RESULTS_OUT)/profiles $(RESULTS_OUT)/parts --file $(RESULTS_FILE)

bench: $(VENV)/.installed-test
	failed=0; for run in "mini" "mini --parts kernels --jobs 5 --name mini-cpu-jobs" "mid"; do \
	  $(BIN)/python -m benchmarks --workload $$run --out $(BENCH_OUT) || failed=1; \
	done; $(BIN)/python -m benchmarks.summary $(BENCH_OUT) || failed=1; exit $$failed

# The stamps make a second call install nothing, until the requirements change.
$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "idea_jax needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-studio: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[studio]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo
