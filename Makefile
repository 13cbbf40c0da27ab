# Two commands do all the set-up on a fresh machine: `make quickstart` and `make test`.
# Variables: PYTHON (3.11 or newer), ARGS (more options for a recipe), DATA (shards or an image tree), CO3D (a packed
# multi-view set), PRETRAIN (a weight file), PIP_ARGS.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
DATA ?= data/imagenet
CO3D ?= data/co3d
CUB ?= data/cub
PRETRAIN ?=
PRETRAINED ?= timm
QUICKSTART_DATA := data/digits
PHOTOS_DATA := data/photos
TOY_DATA := data/toy
RUN := $(VENV)/bin/python -m cli
STAMP := $(VENV)/.installed

# Prints the recipe's header (paper, hardware, cost, number to expect) and its plan, then runs it.
define recipe
@sed -n '/^#/!q;s/^# \{0,1\}//p' conf/$(1).yaml
-$(RUN) plan --config conf/$(1).yaml --data.data $(DATA) $(ARGS)
$(RUN) fit --config conf/$(1).yaml --data.data $(DATA) $(ARGS)
endef

# The same for a multi-view recipe; the second argument gives more options.
define scenes
@sed -n '/^#/!q;s/^# \{0,1\}//p' conf/$(1).yaml
-$(RUN) plan --config conf/$(1).yaml --data.data $(CO3D) $(2) $(ARGS)
$(RUN) fit --config conf/$(1).yaml --data.data $(CO3D) $(2) $(ARGS)
endef

# Trains a small model on ray-cast scenes, then tests it beside the untrained and the trivial predictor.
define toy
@sed -n '/^#/!q;s/^# \{0,1\}//p' conf/$(1).yaml
$(RUN) fit --config conf/$(1).yaml $(ARGS)
$(RUN) test --config conf/$(1).yaml --ckpt_path last
endef

##@ Start here

help: ## list every target
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-zA-Z0-9_.-]+:.*## / {printf "  %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything (3 minutes; PIP_ARGS for your own index)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), Restrike needs 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "== installing into $(VENV) (torch is the largest part; a few minutes)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP) $(QUICKSTART_DATA)/catalogue.json ## train a small FasterViT on real images with EMA and MESA, then test it (3 minutes on a laptop's CPU)
	@sed -n '/^#/!q;s/^# \{0,1\}//p' conf/quickstart.yaml
	@run=runs/quickstart; [ ! -e $$run ] || run=runs/quickstart-$$(date +%Y%m%d-%H%M%S); set -x; \
	  $(RUN) fit --config conf/quickstart.yaml --run_dir $$run $(ARGS); \
	  $(RUN) test --config conf/quickstart.yaml --run_dir $$run --ckpt_path last; \
	  { set +x; } 2>/dev/null; echo "curves, predictions, weights and the report are in $$run"

quickstart-photos: $(STAMP) $(PHOTOS_DATA)/catalogue.json ## the same on crops of real photographs, with the whole RandAugment recipe (3 minutes)
	$(RUN) fit --config conf/quickstart_photos.yaml $(ARGS)
	$(RUN) test --config conf/quickstart_photos.yaml --ckpt_path last

$(QUICKSTART_DATA)/catalogue.json: | $(STAMP)
	$(RUN) prepare digits --out $(QUICKSTART_DATA)

$(PHOTOS_DATA)/catalogue.json: | $(STAMP)
	$(RUN) prepare photos --out $(PHOTOS_DATA)

smoke-vggt: $(STAMP) $(TOY_DATA)/catalogue.json ## train a small VGGT on ray-cast scenes and test it (7 minutes on 2 cores)
	$(call toy,smoke_vggt)
smoke-cut3r: $(STAMP) $(TOY_DATA)/catalogue.json ## the same for a small CUT3R
	$(call toy,smoke_cut3r)
smoke-diffusionsfm: $(STAMP) $(TOY_DATA)/catalogue.json ## the same for a small DiffusionSfM
	$(call toy,smoke_diffusionsfm)

$(TOY_DATA)/catalogue.json: | $(STAMP)
	$(RUN) prepare toy --out $(TOY_DATA)_tree --sequences 100 --size 96 --categories apple bottle cup teddybear --rooms category
	$(RUN) prepare co3d --src $(TOY_DATA)_tree --out $(TOY_DATA)

##@ Keep it right

test: $(STAMP) ## run the test suite (under 15 minutes on 2 cores)
	$(VENV)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## run the longer checks
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

faults: $(STAMP) ## run every fault case and rewrite docs/reliability.md
	$(VENV)/bin/python -m tests.faults.report

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

smoke: $(STAMP) ## two steps of every recipe at smoke size
	$(VENV)/bin/python -m pytest tests/configs $(ARGS)

bench: $(STAMP) ## measure every speed target beside its peer and rewrite docs/benchmarks.md (under 40 minutes on 2 cores)
	$(VENV)/bin/pip install --disable-pip-version-check $(PIP_ARGS) -q --no-deps -c constraints.txt fastervit
	$(VENV)/bin/pip install --disable-pip-version-check $(PIP_ARGS) -q -c constraints.txt litdata
	$(VENV)/bin/python -m benchmarks $(ARGS)

docs: $(STAMP) ## build the documentation site into build/site
	$(VENV)/bin/python -m mkdocs build --strict -d build/site

native: $(STAMP) ## build the optional JPEG region decoder (needs a C compiler and libjpeg-turbo's headers)
	$(VENV)/bin/python -m restrike.data.native.build

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

##@ Reproduce a paper (each prints its cost first; on SLURM see docs/clusters.md)

fastervit-0: $(STAMP) ## FasterViT-0, ImageNet-1k, 82.1 top-1: 4 nodes x 8 A100-40G, 320 epochs
	$(call recipe,fastervit_0)
fastervit-1: $(STAMP) ## FasterViT-1, ImageNet-1k, 83.2 top-1: 4 nodes x 8 A100-40G, 320 epochs
	$(call recipe,fastervit_1)
fastervit-2: $(STAMP) ## FasterViT-2, ImageNet-1k, 84.2 top-1: 4 nodes x 8 A100-40G, 320 epochs
	$(call recipe,fastervit_2)
fastervit-3: $(STAMP) ## FasterViT-3, ImageNet-1k, 84.9 top-1: 4 nodes x 8 A100-40G, 320 epochs
	$(call recipe,fastervit_3)
fastervit-4: $(STAMP) ## FasterViT-4, ImageNet-1k, 85.4 top-1: 4 nodes x 8 A100-80G, 320 epochs
	$(call recipe,fastervit_4)
fastervit-5: $(STAMP) ## FasterViT-5, ImageNet-1k, 85.6 top-1: 4 nodes x 8 A100-80G, 320 epochs
	$(call recipe,fastervit_5)
fastervit-6: $(STAMP) ## FasterViT-6, ImageNet-1k, 85.8 top-1: 4 nodes x 8 A100-80G, 320 epochs
	$(call recipe,fastervit_6)
fastervit-4-21k-pretrain: $(STAMP) ## FasterViT-4 on ImageNet-21k, the paper's 90 epochs: 4 nodes x 8 A100-80G (set DATA)
	$(call recipe,fastervit_4_21k_pretrain)
fastervit-4-21k-224: $(STAMP) ## FasterViT-4 (21k) tuned at 224, 86.6 top-1: 4 nodes x 8 A100-80G, 60 epochs
	$(call recipe,fastervit_4_21k_224)
fastervit-4-21k-384: $(STAMP) ## FasterViT-4 (21k) tuned at 384, 87.6 top-1: 4 nodes x 8 A100-80G, 60 epochs
	$(call recipe,fastervit_4_21k_384)
fastervit-4-21k-512: $(STAMP) ## FasterViT-4 (21k) tuned at 512, 87.8 top-1: 4 nodes x 8 A100-80G, 60 epochs
	$(call recipe,fastervit_4_21k_512)
fastervit-4-21k-768: $(STAMP) ## FasterViT-4 (21k) tuned at 768, 87.9 top-1: 4 nodes x 8 A100-80G, 60 epochs
	$(call recipe,fastervit_4_21k_768)

vit-finetune: $(STAMP) ## fine-tune DINOv2 ViT-B/14 at 518 px under the square-root rule: 1 GPU or more (set CUB, PRETRAINED)
	@sed -n '/^#/!q;s/^# \{0,1\}//p' conf/vit_finetune.yaml
	-$(RUN) plan --config conf/vit_finetune.yaml --data.data $(CUB) --model.pretrained $(PRETRAINED) $(ARGS)
	$(RUN) fit --config conf/vit_finetune.yaml --data.data $(CUB) --model.pretrained $(PRETRAINED) $(ARGS)

vggt-co3d: $(STAMP) ## VGGT-1B fine-tuned on CO3D from the released weights: 1 node x 4 GPUs of 80 GB (set CO3D, PRETRAIN)
	$(call scenes,vggt_co3d_finetune,$(if $(PRETRAIN),--model.pretrained $(PRETRAIN)))
vggt-scratch: $(STAMP) ## VGGT-1B from scratch, the paper's schedule, on CO3D: 8 nodes x 8 A100-80G (set CO3D)
	$(call scenes,vggt_scratch)

diffusionsfm-sparse: $(STAMP) ## DiffusionSfM, first stage, on CO3D: 1 node x 8 GPUs (set CO3D)
	$(call scenes,diffusionsfm_sparse)
diffusionsfm-dense: $(STAMP) ## DiffusionSfM, second stage, from sparse weights: 1 node x 8 GPUs (set CO3D, PRETRAIN=sparse weights)
	$(call scenes,diffusionsfm_dense,$(if $(PRETRAIN),--model.sparse_pretrained $(PRETRAIN)))
diffusionsfm-debug: $(STAMP) ## DiffusionSfM on one category, 1 GPU, no W&B (set CO3D)
	$(call scenes,diffusionsfm_debug)

cut3r-stage1: $(STAMP) ## CUT3R, stage 1 of 4, on CO3D: 1 node x 8 A100-80G (set CO3D)
	$(call scenes,cut3r_stage1)
cut3r-stage2: $(STAMP) ## stage 2, from the last one's weights
	$(call scenes,cut3r_stage2)
cut3r-stage3: $(STAMP) ## stage 3: DPT heads at 512
	$(call scenes,cut3r_stage3)
cut3r-stage4: $(STAMP) ## stage 4: long sequences
	$(call scenes,cut3r_stage4)
cut3r: $(STAMP) ## the whole chain; goes on where it was stopped
	for stage in 1 2 3 4; do $(RUN) plan --config conf/cut3r_stage$$stage.yaml --data.data $(CO3D) $(ARGS) || true; done
	for stage in 1 2 3 4; do $(RUN) fit --config conf/cut3r_stage$$stage.yaml --auto true --data.data $(CO3D) $(ARGS); done
cut3r-dpt-512-vary-4-64: $(STAMP) ## CUT3R fine-tuned on 4 to 64 views from released weights: 1 node x 8 A100-80G (set CO3D, PRETRAIN)
	$(call scenes,cut3r_dpt_512_vary_4_64,$(if $(PRETRAIN),--model.pretrained $(PRETRAIN)))
cut3r-linear-224-fixed-16: $(STAMP) ## CUT3R fine-tuned on 16 views at 224 px from released weights (set CO3D, PRETRAIN)
	$(call scenes,cut3r_linear_224_fixed_16,$(if $(PRETRAIN),--model.pretrained $(PRETRAIN)))

.PHONY: $(shell sed -n 's/^\([a-z0-9][a-z0-9-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))
