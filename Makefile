# make demo: the built-in cohort from slides to results/report/index.html      make test: lint is `make lint`
PYTHON ?= python3
BIN := .venv/bin
CORES ?= all
JOBS ?= 2

.PHONY: help demo test validate soak lint lock clean setup

help:
	@echo "make demo    set up .venv if needed, then run the demo cohort to results/report/index.html"
	@echo "make test    set up .venv if needed, then run the tests"
	@echo "make validate TILES=folder COHORTS=6 SEED=1    fresh cohorts from a folder of labelled tiles: does it work on such tissue?"
	@echo "make soak    set up .venv if needed, then run the long harnesses: kills, damage, spoilt disks"
	@echo "make lint    ruff, snakefmt and mypy"
	@echo "make lock    renew envs/requirements.txt from requirements-test.in, and envs/slidemake.yaml"
	@echo "make clean   remove the demo's results and slides (not .venv)"

setup: .venv/ready

.venv/ready: envs/requirements.txt pyproject.toml
	@echo "slidemake: setting up .venv with the locked packages (about 2 GB to download, 7 GB on disk, about 6 minutes)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "slidemake needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r envs/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --editable .
	@touch .venv/ready
	@echo "slidemake: .venv is ready (source .venv/bin/activate, then plain snakemake works too)"

demo: setup
	@echo "slidemake: running the demo cohort on $(CORES) cores"
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES)
	@echo "slidemake: open results/report/index.html"

soak: setup
	@echo "slidemake: killing, fuzzing and spoiling disks for an hour or more (full and forbidden disks only as root)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 SLIDEMAKE_LONG_TESTS=1 $(BIN)/python -m pytest -m long tests/workflow
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py --folder "$${SOAK:-$$(mktemp -d -t slidemake-soak-XXXXXX)}"

test: setup
	@echo "slidemake: running the tests (about half an hour on 2 cores; real slides are used where SLIDEMAKE_TEST_DATA points)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# docs/validation.md; empty values are left out, OPTIONS takes any other option of benchmarks/validate.py
validate: setup
	@test -n "$(TILES)" || { echo "make validate needs TILES=folder with a tiles.csv (path, label, group): docs/validation.md"; exit 2; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python benchmarks/validate.py --tiles "$(TILES)" \
		$(if $(COHORTS),--cohorts $(COHORTS)) $(if $(SEED),--seed $(SEED)) $(if $(PATIENTS),--patients $(PATIENTS)) \
		$(if $(MPP),--mpp $(MPP)) $(if $(BENIGN),--benign "$(BENIGN)") $(if $(TUMOUR),--tumour "$(TUMOUR)") \
		$(if $(UNGROUPED),--ungrouped) $(if $(OUT),--out "$(OUT)") $(OPTIONS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/snakefmt --check Snakefile rules
	@$(BIN)/mypy scripts/slidemake

lock:
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv
	@cd envs && ../.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--output-file requirements.txt requirements-test.in
	@$(PYTHON) tests/unit/test_environments.py
	@rm -rf .venv-lock

clean:
	@rm -rf results demo_slides slurm_logs .snakemake
