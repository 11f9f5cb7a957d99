"""The commands of the original's PRETRAIN.md and FINETUNE.md, word for word, with small numbers."""

import os
import re
import shlex
import time
from pathlib import Path

import pytest
import torch

from tests.checks import assert_ok, assert_one_line, load, log_lines
from tests.pictures import picture
from tests.runs import Launcher, Result, free_port

PRETRAIN = """python submitit_pretrain.py --job_dir ${JOB_DIR} --nodes 3 --batch_size 128
    --model convmae_convvit_base_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 1600
    --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path ${IMAGENET_DIR}"""
PRETRAIN_V100 = PRETRAIN.replace(
    "--nodes 3 --batch_size 128", "--nodes 8 --use_volta32 --batch_size 64"
)
RECIPE = """--model convvit_base_patch16 --finetune ${PRETRAIN_CHKPT} --epochs 100 --blr 5e-4
    --layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0
    --dist_eval --data_path ${IMAGENET_DIR}"""
FINETUNE = (
    f"""python submitit_finetune.py --job_dir ${{JOB_DIR}} --nodes 4 --batch_size 32 {RECIPE}"""
)
LAUNCH = "python -m torch.distributed.launch --nproc_per_node=8"
FINETUNE_ONE_NODE = f"{LAUNCH} main_finetune.py --batch_size 32 {RECIPE}"
PROBE_RECIPE = """--model convvit_base_patch16 --global_pool --finetune ${PRETRAIN_CHKPT}
    --epochs 90 --blr 0.1 --weight_decay 0.0 --dist_eval --data_path ${IMAGENET_DIR}"""
PROBE = f"{LAUNCH} main_linprobe.py --batch_size 128 {PROBE_RECIPE}"
PROBE_NODES = (
    f"python submitit_linprobe.py --job_dir ${{JOB_DIR}} --nodes 4 --batch_size 128 {PROBE_RECIPE}"
)
EVALUATE = f"""{LAUNCH} main_finetune.py --batch_size 32 --model convvit_base_patch16
    --resume ${{FINETUNE_CHKPT}} --dist_eval --data_path ${{IMAGENET_DIR}} --eval"""
# Longer than the warm-up that the recipe leaves to the default.
EPOCHS = {"pretrain": 2, "finetune": 6, "linprobe": 11}


def small(command: str, processes: int = 2, **paths: object) -> list[str]:
    """The command after `python` with the tiny model, so many processes, few epochs."""
    for name, path in paths.items():
        command = command.replace(f"${{{name.upper()}}}", str(path))
    kind = re.search("pretrain|finetune|linprobe", command)[0]
    for pattern, by in (
        ("_base_patch16", "_tiny_patch16"),
        (r"--nodes \d", f"--nodes 1 --cluster local --ngpus 0 --ntasks {processes}"),
        ("--nproc_per_node=8", f"--nproc_per_node={processes} --master_port={free_port()}"),
        (r"--batch_size \d+", "--batch_size 4"),
        (r"--epochs (90|100|1600)", f"--epochs {EPOCHS[kind]}"),
        ("--warmup_epochs 40", "--warmup_epochs 1"),
    ):
        command = re.sub(pattern, by, command)
    return shlex.split(command)[1:]


def without_launch(command: str, **paths: object) -> list[str]:
    """The small command from the name of the main on: one process."""
    words = small(command, **paths)
    return words[next(i for i, word in enumerate(words) if word.startswith("main_")) :]


def run(launcher: Launcher, command: list[str], *more: object) -> Result:
    """A script, or a module after `-m`, to its end."""
    if command[0] == "-m":
        return launcher.run(*command[2:], *more, program=command[1])
    return launcher.run(*command[1:], *more, program=command[0])


def submitted(launcher: Launcher, command: list[str]) -> str:
    """The log of a job run on this machine to its end."""
    result = run(launcher, command)
    assert_ok(result)
    log = Path(re.search(r"its log: (.+)", result.out)[1])
    end = time.monotonic() + 120
    while not log.exists() or "completed successfully" not in log.read_text():
        text = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < end and "exception" not in text, text
        time.sleep(0.05)
    return log.read_text()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Sixteen images of two classes to train on, four to evaluate on."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("n01440764", "n01443537")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(10 * label + i, 40, 48).save(root / split / name / f"{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def pretrained(launcher, imagenet, tmp_path_factory) -> Path:
    """The folder of the published pretraining command's job."""
    pytest.importorskip("submitit", reason="needs requirements-slurm.txt")
    folder = tmp_path_factory.mktemp("pretrain")
    submitted(launcher, small(PRETRAIN, job_dir=folder, imagenet_dir=imagenet))
    return folder


@pytest.fixture(scope="module")
def finetuned(launcher, imagenet, pretrained, tmp_path_factory) -> Path:
    """The folder of the published fine-tuning command on one node."""
    folder = tmp_path_factory.mktemp("finetune")
    paths = dict(imagenet_dir=imagenet, pretrain_chkpt=pretrained / "checkpoint.pth")
    result = run(launcher, small(FINETUNE_ONE_NODE, **paths), "--output_dir", folder)
    assert_ok(result)
    assert "2 classes" in result.out
    return folder


def test_pretraining_leaves_its_checkpoints_in_the_job_dir(pretrained):
    assert [line["epoch"] for line in log_lines(pretrained)] == [0, 1]
    args = load(pretrained / "checkpoint.pth")["args"]
    assert args["norm_pix_loss"] and args["effective_batch_size"] == 8


def test_fine_tuning_on_one_node_trains_to_its_end(finetuned):
    lines = log_lines(finetuned)
    assert [line["epoch"] for line in lines] == list(range(6))
    assert all("test_acc1" in line for line in lines)


def test_fine_tuning_on_nodes_trains_to_its_end(launcher, imagenet, pretrained, tmp_path):
    paths = dict(imagenet_dir=imagenet, pretrain_chkpt=pretrained / "checkpoint.pth")
    log = submitted(launcher, small(FINETUNE, processes=1, job_dir=tmp_path, **paths))
    assert "on the 4 test images" in log
    assert len(log_lines(tmp_path)) == 6


def test_a_linear_probe_trains_to_its_end(launcher, imagenet, pretrained, tmp_path):
    paths = dict(imagenet_dir=imagenet, pretrain_chkpt=pretrained / "checkpoint.pth")
    result = run(launcher, without_launch(PROBE, **paths), "--output_dir", tmp_path)
    assert_ok(result)
    assert "the encoder frozen" in result.out
    assert len(log_lines(tmp_path)) == 11


def test_evaluation_says_the_accuracy_of_the_last_epoch(launcher, imagenet, finetuned):
    paths = dict(imagenet_dir=imagenet, finetune_chkpt=finetuned / "checkpoint.pth")
    result = run(launcher, without_launch(EVALUATE, **paths))
    assert_ok(result)
    accuracy = float(re.search(r"\* Acc@1 ([\d.]+)", result.out)[1])
    assert accuracy == pytest.approx(log_lines(finetuned)[-1]["test_acc1"], abs=1e-3)


def test_evaluation_under_the_name_of_another_model_is_refused(launcher, imagenet, finetuned):
    paths = dict(imagenet_dir=imagenet, finetune_chkpt=finetuned / "checkpoint.pth")
    command = [part.replace("_tiny_", "_large_") for part in without_launch(EVALUATE, **paths)]
    result = run(launcher, command)
    assert_one_line(result, 2, "--model convvit_large_patch16 is not what", "tiny")


def test_an_encoder_evaluated_by_mistake_is_refused(launcher, imagenet, tmp_path):
    torch.save({"model": {"cls": torch.zeros(1)}}, tmp_path / "x.pth")
    paths = dict(imagenet_dir=imagenet, finetune_chkpt=tmp_path / "x.pth")
    assert_one_line(run(launcher, without_launch(EVALUATE, **paths)), 2, "x.pth")


@pytest.mark.parametrize("command", [PRETRAIN, PRETRAIN_V100, FINETUNE, PROBE_NODES])
def test_slurm_gets_the_nodes_and_the_main_its_own_flags(command, launcher, imagenet, tmp_path):
    pytest.importorskip("submitit", reason="needs requirements-slurm.txt")
    programs, jobs = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    sbatch = f'cp "$1" {tmp_path}/script; echo "Submitted batch job 42"'
    for name, lines in (("srun", ""), ("sbatch", sbatch)):
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    paths = {"JOB_DIR": jobs, "IMAGENET_DIR": imagenet, "PRETRAIN_CHKPT": "pretrained.pth"}
    for name, path in paths.items():
        command = command.replace(f"${{{name}}}", str(path))
    script, *line = shlex.split(command)[1:]
    env = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    result = launcher.run(*line, program=script, env=env)
    assert_ok(result)
    program = script.replace("submitit_", "main_")
    nodes = line[line.index("--nodes") + 1]
    assert result.out.startswith(f"job 42: {nodes} x 8 processes of {program}; its log: ")
    options = re.findall(r"#SBATCH --(.+)", (tmp_path / "script").read_text())
    assert f"nodes={nodes}" in options and "gpus-per-node=8" in options
    assert ("constraint=volta32gb" in options) == ("--use_volta32" in line)


def test_a_misspelt_flag_of_a_submitit_script_is_refused_by_the_main(launcher, tmp_path):
    line = ["--job_dir", tmp_path / "jobs", "--batchsize", 8, "--data_path", "x"]
    result = launcher.run(*line, program="submitit_pretrain.py")
    assert_one_line(result, 2, "main_pretrain.py: error:", "did you mean --batch_size?")
    assert not (tmp_path / "jobs").exists()
