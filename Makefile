# make venv | demo | demo-uboot | test | lint | bench | crash | crash-linux | interop-vhost |
# fuzz (= fuzz-rings fuzz-vhost fuzz-qcow2 fuzz-img) | mutants | mutants-device | conformance:
# each sets up what it needs, in this folder only.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo demo-uboot test crash crash-linux interop-vhost \
	fuzz fuzz-rings fuzz-vhost fuzz-qcow2 fuzz-img mutants mutants-device conformance lint bench clean

# Compiled at once, as pip does for what it installs itself: programs that are started thousands of
# times do not compile, where the environment keeps Python from writing bytecode.
venv: $(STAMP)
	@$(BIN)/python -m compileall -q __init__.py errors.py backend machine qcow2 tools virtio

# Compiled at once: the programs start in half the time.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	$(BIN)/python -m compileall -q $(filter-out py.typed,$(PACKAGE))
	touch $@

demo: venv
	$(BIN)/python -m examples.emulator.demo

demo-uboot: venv
	$(BIN)/python -m examples.emulator.demo_uboot

# Side by side, a file of tests on one worker: what a file sets up is set up once.
test: venv
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The random parts of the suite, twenty times as long: model, power failures, faults.
crash: venv
	PYVIRTIO_CRASH_SCALE=20 PYVIRTIO_MODEL_SCALE=20 PYVIRTIO_SEQUENCES=100 \
		$(BIN)/python -m pytest tests/crash tests/machine tests/qcow2/test_model.py

# Fifty power cuts under Linux instead of three: a quarter of an hour.
crash-linux: venv
	PYVIRTIO_LINUX_CUTS=50 $(BIN)/python -m pytest tests/examples/test_linux_crash.py

# A Linux guest of QEMU on our vhost-user server: split and packed rings, reboots, servers killed,
# live migration. Ten minutes.
interop-vhost: venv
	PYVIRTIO_GUESTS=1 $(BIN)/python -m pytest tests/interop/test_vhost_user_guest.py \
		tests/interop/test_vhost_user_migration.py

# What follows one after the other, MINUTES (ten) each: hostile rings, hostile messages, images, command
# lines. Each prints what it finds, with what runs it again, and fails; FUZZ="…" are its own options.
MINUTES ?= 10
fuzz: fuzz-rings fuzz-vhost fuzz-qcow2 fuzz-img

# atheris looks for ways into the device, over rings, registers and guest memory; options are libFuzzer's.
fuzz-rings: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m support.ring_fuzz -max_total_time=$$((60 * $(MINUTES))) $(FUZZ)

# Random messages of a hostile vhost-user front-end. FUZZ="--seed 1" says which.
fuzz-vhost: venv
	PYTHONPATH=tests $(BIN)/python -m support.vhost_fuzz --minutes $(MINUTES) $(FUZZ)

# Twin images, ours and QEMU's, through random operations; prints which features met.
# FUZZ="--seed 1 --sequences 5" runs certain ones.
fuzz-qcow2: venv
	PYTHONPATH=tests $(BIN)/python -m support.fuzz --minutes $(MINUTES) $(FUZZ)

# Random command lines for pyvirtio-img and qemu-img. FUZZ="--seed 1 --count 100" gives both certain ones.
fuzz-img: venv
	PYTHONPATH=tests $(BIN)/python -m support.img_twins --minutes $(MINUTES) $(FUZZ)

# A list of one-line faults, each put into a copy of the code: the tests named must catch all.
mutants: venv
	$(BIN)/python tests/mutants/run.py $(MUTANTS)

# The conformance suite on our own device in all its forms; the matrix goes to docs/.
FORMS := mmio mmio_callbacks mmio_v1 mmio_v1_big pci pci_callbacks pci_legacy vhost_user
conformance: venv
	mkdir -p build/conformance
	for form in $(FORMS); do \
		$(BIN)/python -m pytest -q --pyargs pyvirtio.virtio.conformance --matrix build/conformance/$$form \
			--device pyvirtio.virtio.conformance.ours:$$form || exit 1; \
	done
	$(BIN)/python -m pyvirtio.virtio.conformance.table --title "Our own device" \
		$(foreach form,$(FORMS),$(form)=build/conformance/$(form).json) > docs/conformance_matrix.md

# A fault for each rule for devices: the tests of the suite that cite the rule must find it.
mutants-device: venv
	$(BIN)/python tests/mutants/device.py $(MUTANTS)

# mypy has to see the root folder under the package's own name.
PACKAGE := __init__.py errors.py py.typed backend machine qcow2 tools virtio
build/types/pyvirtio: Makefile
	rm -rf $@
	mkdir -p $@
	ln -s $(PACKAGE:%=../../../%) $@/
	touch $@

lint: venv build/types/pyvirtio
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pyvirtio

bench: venv
	$(BIN)/python benchmarks/device.py --format raw
	$(BIN)/python benchmarks/device.py --format qcow2
	for program in benchmarks/qcow2*.py benchmarks/machine.py benchmarks/vhost_user.py; do \
		$(BIN)/python $$program || exit 1; done

clean:
	rm -rf $(VENV) build .cache *.egg-info
