import json

import pytest

from benchmarks.profile_step import kind_of, main, tables

SMALL = ["--model", "tiny", "--input_size", "32", "--batch_size", "2", "--steps", "1"]


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_a_step_is_traced_and_its_time_is_told_by_kind(tmp_path, capsys, program):
    file = tmp_path / "trace.json"
    main([program, *SMALL, "--device", "cpu", "--trace", str(file)])
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"]}
    assert {"aten::addmm", "aten::mm"} <= names
    printed = capsys.readouterr().out
    for kind in ("matrix products", "attention", "norms", "optimizer", "convolution"):
        assert f"\n| {kind} " in printed
    assert "| aten::addmm " in printed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("triton_poi_fused_gelu_3", "compiled and fused"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("aten::convolution_backward", "convolution"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and layout"),
        ("aten::index_select", "gather and scatter"),
        ("elementwise_kernel<gpu_kernel_impl(TensorIteratorBase&)::{lambda(int)#1}>", "other"),
        ("aten::unheard_of", "other"),
    ],
)
def test_kinds_follow_from_names(name, kind):
    assert kind_of(name) == kind


def test_shares_are_of_the_whole_time():
    by_kind, by_name = tables({"aten::mm": (30.0, 6), "aten::copy_": (10.0, 2)}, 2, 1)
    assert "| matrix products   | 15.00     | 75.0% |" in by_kind
    assert "| copies and layout | 5.00      | 25.0% |" in by_kind
    assert "aten::mm" in by_name and "aten::copy_" not in by_name and "| 3 " in by_name


@pytest.mark.parametrize("options", [["--forms", "sparse"], ["--trace", "no/such/folder/t.json"]])
def test_a_bad_option_is_refused_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["pretrain", "--model", "tiny", *options])
    assert refusal.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
