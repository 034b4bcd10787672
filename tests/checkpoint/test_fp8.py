"""FP8 blocks against a loop in float64, and FP8 folders against the weights multiplied out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseling.checkpoint.convert import convert_folder
from sparseling.checkpoint.fp8 import dequantize_blocks, quantize_blocks, round_up_to_power_of_two, scale_shape
from sparseling.checkpoint.hf import load_model, read_tensors
from sparseling.errors import UserError

from .checkpoint_samples import CHAT, SMALL, made_model, public_tensors, write_public, write_sharded

FP8 = torch.float8_e4m3fn
SHAPES = [(128, 128), (256, 384), (130, 100), (1, 1), (127, 257), (5, 400)]


def random_weight(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight * torch.exp(3 * torch.randn(shape[0], 1, generator=generator))  # rows of very different size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_dequantised_blocks_equal_a_loop_in_float64(shape: tuple[int, int], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(FP8)
    scales = torch.rand(scale_shape(shape, block), generator=generator) + 1e-3
    exact = torch.empty(shape, dtype=torch.float64)
    for row in range(shape[0]):
        for first in range(0, shape[1], block[1]):
            part = codes[row, first : first + block[1]].double()
            exact[row, first : first + block[1]] = part * scales[row // block[0], first // block[1]].double()
    assert torch.equal(dequantize_blocks(codes, scales, block, torch.float32), exact.float())
    assert torch.equal(dequantize_blocks(codes, scales, block), exact.float().bfloat16())


def nearest_code(value: float, table: list[float]) -> float:
    """Round to nearest by search; of two equally near the one with even mantissa, which is at an even place of the table."""
    best = min(range(len(table)), key=lambda n: (abs(table[n] - value), n % 2))
    return table[best]


@pytest.mark.parametrize("shape", [(130, 100), (3, 150), (1, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_blocks_follow_the_published_rule(shape: tuple[int, int], power_of_two: bool) -> None:
    weight = random_weight(shape, 2)
    codes, scales = quantize_blocks(weight, power_of_two=power_of_two)
    assert scales.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128)) and scales.dtype == torch.float32
    table = torch.arange(127, dtype=torch.uint8).view(FP8).double().tolist()  # 0 .. 448, mantissa even at even places
    for row in range(0, shape[0], 13):
        for column in range(0, shape[1], 7):
            block = weight[row // 128 * 128 : (row // 128 + 1) * 128, column // 128 * 128 : (column // 128 + 1) * 128]
            scale = max(float(block.abs().max()), 1e-4) / 448
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            stored = float(scales[row // 128, column // 128])
            assert stored == pytest.approx(scale, rel=1e-7)
            value = float(weight[row, column] / torch.tensor(stored))
            assert float(codes[row, column].float()) == math.copysign(nearest_code(abs(value), table), value)


def test_power_of_two_is_exact_at_and_around_every_power() -> None:
    powers = torch.ldexp(torch.ones(200), torch.arange(-100, 100))
    up, down = (torch.nextafter(powers, torch.tensor(limit)) for limit in (math.inf, 0.0))
    assert torch.equal(round_up_to_power_of_two(powers), powers)
    assert torch.equal(round_up_to_power_of_two(up), powers * 2)
    assert torch.equal(round_up_to_power_of_two(down), powers)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_error_of_one_trip_is_within_half_a_step(power_of_two: bool) -> None:
    weight = random_weight((200, 300), 3)
    codes, scales = quantize_blocks(weight, power_of_two=power_of_two)
    error = (dequantize_blocks(codes, scales, dtype=torch.float32) - weight).abs()
    per_element = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    # 3 mantissa bits: half a step is 2^-4 of the value, and 2^-10 of the scale below the smallest normal code.
    assert (error <= weight.abs() * 2**-4 * 1.0001 + per_element * 2**-10).all()
    assert torch.isfinite(codes.float()).all()


def test_zero_block_has_the_floor_as_scale() -> None:
    codes, scales = quantize_blocks(torch.zeros(128, 256))
    assert torch.equal(scales, torch.full((1, 2), 1e-4) / 448)
    assert not codes.float().any()


def fp8_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what an FP8 checkpoint stores, the same multiplied out in float32) for the published set of FP8 matrices."""
    stored, exact = {}, {}
    for name, tensor in tensors.items():
        listed = tensor.dim() == 2 and (".attention." in name or "_proj.weight" in name) and "eh_proj" not in name
        if not listed:
            stored[name] = exact[name] = tensor if name.endswith("expert_bias") else tensor.bfloat16()
            continue
        codes, scales = quantize_blocks(tensor, block=(16, 16), power_of_two="dense" in name)
        stored |= {name: codes, name + "_scale_inv": scales}
        exact[name] = codes.float() * scales.repeat_interleave(16, 0)[: tensor.shape[0]].repeat_interleave(16, 1)[:, : tensor.shape[1]]
    return stored, exact


QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


@pytest.mark.parametrize("shards", [1, 5])  # with 5 a scale often lies in another file than its codes
def test_fp8_folder_loads_as_the_weights_multiplied_out(tmp_path: Path, shards: int) -> None:
    stored, exact = fp8_tensors(public_tensors(made_model()))
    write_sharded(tmp_path, SMALL, stored, shards)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    in_bfloat16, in_float32 = (public_tensors(load_model(tmp_path, dtype), dtype or torch.bfloat16) for dtype in (None, torch.float32))
    for name, tensor in exact.items():
        bias = name.endswith("expert_bias")
        assert torch.equal(in_float32[name], tensor.float()), name
        assert torch.equal(in_bfloat16[name], tensor if bias else tensor.bfloat16()), name
        assert in_bfloat16[name].dtype == (torch.float32 if bias else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_folder_converts_to_a_plain_one(tmp_path: Path, dtype: torch.dtype) -> None:
    stored, exact = fp8_tensors(public_tensors(made_model(CHAT)))
    write_public(tmp_path / "fp8", CHAT, stored, quantization_config=QUANTIZATION)
    convert_folder(tmp_path / "fp8", tmp_path / "out", dtype, max_shard_bytes=30_000)
    plain = dict(read_tensors(tmp_path / "out"))
    assert plain.keys() == exact.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, exact[name].to(torch.float32 if name.endswith("expert_bias") else dtype))
    public = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in public and public["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_fp8_without_scales_and_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    stored, _ = fp8_tensors(public_tensors(made_model(CHAT)))
    name = "model.layers.0.attention.dense.weight"
    write_public(tmp_path / "blocks", CHAT, stored)  # config says nothing, so 128x128
    with pytest.raises(UserError, match="in blocks of 128x128; check weight_block_size"):
        load_model(tmp_path / "blocks")
    scales = stored.pop(name + "_scale_inv")
    write_public(tmp_path / "lost", CHAT, stored, quantization_config=QUANTIZATION)
    with pytest.raises(UserError, match=f"{name} is FP8 without {name}_scale_inv"):
        load_model(tmp_path / "lost")
    stored |= {name: torch.zeros(32, 32), name + "_scale_inv": scales}
    write_public(tmp_path / "plain", CHAT, stored, quantization_config=QUANTIZATION)
    with pytest.raises(UserError, match=f"{name} has FP8 scales but is not FP8"):
        load_model(tmp_path / "plain")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [({"quant_method": "gptq"}, "quant_method 'gptq'"), ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
     ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"), ("int8", "quant_method 'int8'")],
)
def test_other_quantisations_are_refused(tmp_path: Path, quantization: object, message: str) -> None:
    write_public(tmp_path, CHAT, public_tensors(made_model(CHAT)), quantization_config=quantization)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)
