# Every target sets itself up in .venv, from constraints.txt; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test chaos check bench venv clean

demo: .venv/demo.done  ## four real tenants on a real base: mixed answers, proven right
	$(BIN)/adapter-router demo

serve: .venv/demo.done  ## the same application, until Ctrl-C
	$(BIN)/adapter-router serve

test: .venv/dev.done  ## all tests: those without Ray side by side, then those with a local Ray
	$(BIN)/python -m pytest -m "not serve" -n logical --maxprocesses 4 --dist loadfile --cov --cov-report=; parallel=$$?; \
	$(BIN)/python -m pytest -m serve --cov --cov-append --cov-report=term:skip-covered && exit $$parallel

chaos: .venv/dev.done  ## processes killed and stopped again and again under load; figures go to benchmarks/results
	CHAOS_ROUNDS=5 CHAOS_JSON=benchmarks/results/chaos.json $(BIN)/python -m pytest --timeout 1800 tests/test_chaos.py tests/test_chaos_cluster.py

check: .venv/dev.done  ## style, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/dev.done  ## all benchmarks; results go to benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.grouped_forward --json benchmarks/results/grouped_forward.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.mixes --json benchmarks/results/mixes.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.quantized_bases --json benchmarks/results/quantized_bases.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.cache --json benchmarks/results/cache.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.cold_loads --json benchmarks/results/cold_loads.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.many_adapters --json benchmarks/results/many_adapters.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.routing_decisions --json benchmarks/results/routing_decisions.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.routing_sim --json benchmarks/results/routing_sim.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.serving --json benchmarks/results/serving.json
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.overload --json benchmarks/results/overload.json

venv: .venv/dev.done  ## only the environment, with test extras and PEFT

clean:
	rm -rf .venv

.venv/%.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
