"""Who computes the product: this package, cuBLAS and other projects, behind one face.

A provider is imported when it is first asked for, so a missing one fails alone.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from ahead import compile_plans
from cases import Case
from torch import Tensor
from weights import codes_of, dense

from gptq_triton import ops
from gptq_triton.layout import ONE_GROUP, STEP, STRIP, tile_weight
from gptq_triton.packing import PackedWeight
from gptq_triton.plans import Plan, Problem, TransposedPlan
from gptq_triton.product import gpu, plans_of, plans_transposed


class Provider:
    """One way to compute a case.

    Attributes:
        name: In result files.
        dense: The weight is held in 16 bits.
        requantizes: The weight is rounded to a grid of its own, so that products differ.
    """

    name: str
    dense = False
    requantizes = False

    def refusal(self, case: Case) -> str | None:
        """Why this provider does not compute the case; None if it does."""
        return None

    def prepare(self, cases: Sequence[Case]) -> None:
        """Compile ahead, in parallel, what the cases need."""

    def load(self, weight: PackedWeight, case: Case, copies: int) -> list[Any]:
        """The weight in this provider's form, so many times, each in memory of its own."""
        raise NotImplementedError

    def bind(self, layer: Any, x: Tensor, case: Case) -> Callable[[], Tensor]:
        """The call to be timed; whatever else must be done, is done here."""
        raise NotImplementedError

    def plan(self, case: Case) -> str | None:
        """How the product is launched, if the provider tells."""
        return None


class Ours(Provider):
    """gptq_triton on its resident layout."""

    name = "ours"

    def load(self, weight: PackedWeight, case: Case, copies: int) -> list[Any]:
        tiled = tile_weight(weight)
        return [_clone(tiled) for _ in range(copies)]

    def bind(self, layer: Any, x: Tensor, case: Case) -> Callable[[], Tensor]:
        product = getattr(ops, case.op)
        return lambda: product(x, layer)

    def prepare(self, cases: Sequence[Case]) -> None:
        forward = [case for case in cases if case.op == "matmul"]
        compile_plans(job for case in forward for job in plans_of(self._problem(case), 0))

    def plan(self, case: Case) -> str | None:
        problem = self._problem(case)
        parts = plans_transposed(problem) if case.op == "matmul_transposed" else plans_of(problem, 0)
        if len(parts) == 1:
            return _text(parts[0][1])
        return " + ".join(f"{part.M} rows: {_text(plan)}" for part, plan in parts)

    def _problem(self, case: Case) -> Problem:
        columns = ONE_GROUP if case.group_size == -1 else case.group_size
        return Problem(
            case.M,
            -(-case.N // STRIP),
            -(-case.K // STEP),
            case.bits,
            columns,
            getattr(torch, case.dtype),
            True,
            *gpu(0),
            ordered=case.act_order,
        )


def _text(plan: Plan | TransposedPlan) -> str:
    return " ".join(f"{key}={value}" for key, value in dataclasses.asdict(plan).items())


class CuBLAS(Provider):
    """torch's matmul with the dequantized weight."""

    name = "cublas"
    dense = True

    def load(self, weight: PackedWeight, case: Case, copies: int) -> list[Tensor]:
        first = dense(weight, getattr(torch, case.dtype))
        return [first.clone() for _ in range(copies)]

    def bind(self, layer: Tensor, x: Tensor, case: Case) -> Callable[[], Tensor]:
        if case.op == "matmul_transposed":
            return lambda: torch.mm(x, layer)
        return lambda: torch.nn.functional.linear(x, layer)


class TinyGemm(Provider):
    """``torch._weight_int4pack_mm``: 4 bits; always bfloat16, whatever the case says."""

    name = "tinygemm"

    def refusal(self, case: Case) -> str | None:
        if case.op != "matmul" or case.bits != 4 or case.act_order:
            return "4 bits, forward, groups in order only"
        if case.group_size not in (32, 64, 128, 256) or case.K % case.group_size or case.K % 128 or case.N % 8:
            return "K must be whole groups of 32 to 256"
        return "more than 64 rows: slower than cuBLAS by 8x and more" if case.M > 64 else None

    def load(self, weight: PackedWeight, case: Case, copies: int) -> list[tuple[Tensor, Tensor]]:
        codes, scales, zeros = codes_of(weight)
        codes = codes.t().contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        middle = (8 - zeros.float()) * scales.float()  # it computes scale * (code - 8) + middle
        grid = torch.stack([scales.float(), middle], -1).bfloat16().contiguous()
        return [(packed.clone(), grid.clone()) for _ in range(copies)]

    def bind(self, layer: tuple[Tensor, Tensor], x: Tensor, case: Case) -> Callable[[], Tensor]:
        x = x.bfloat16()
        return lambda: torch.ops.aten._weight_int4pack_mm(x, layer[0], case.group_size, layer[1])


class Humming(Provider):
    """humming, the CUDA C++ kernels that vLLM uses. It quantizes the dequantized weight again."""

    requantizes = True

    def __init__(self, sym: bool):
        self.sym = sym
        self.name = "humming-sym" if sym else "humming"

    def refusal(self, case: Case) -> str | None:
        if case.op != "matmul" or case.act_order:
            return "forward, groups in order only"
        if case.group_size != -1 and case.K % case.group_size:
            return "K must be whole groups"
        return None

    def prepare(self, cases: Sequence[Case]) -> None:
        """Every kernel in a thread of its own, whose compiler is a process of its own."""

        def compile_one(case: Case) -> None:
            # what fails here fails again in bind, where it is recorded
            with suppress(Exception):
                config = self._config(case)
                importlib.import_module("humming.kernel.humming").HummingKernel.prepare_kernels(
                    config.to_str(), None, self._tuning(config, case)
                )

        importlib.import_module("humming.layer")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, cases))

    def load(self, weight: PackedWeight, case: Case, copies: int) -> list[Any]:
        layer = self._layer(case).cuda()
        layer.load_from_unquantized(dense(weight, getattr(torch, case.dtype)))
        layer.transform()
        return [copy.deepcopy(layer) for _ in range(copies)]

    def bind(self, layer: Any, x: Tensor, case: Case) -> Callable[[], Tensor]:
        # what its forward would choose among all M, without compiling for all M
        tuning = self._tuning(layer.humming_config, case)
        return lambda: layer(x, tuning_config=tuning)

    def _layer(self, case: Case) -> Any:
        grid = {
            "dtype": f"uint{case.bits}",
            "group_size": max(case.group_size, 0),  # 0: one group
            "has_zero_point": not self.sym,
        }
        humming = importlib.import_module("humming.layer")
        return humming.HummingLayer(
            shape_n=case.N, shape_k=case.K, weight_config=grid, torch_dtype=getattr(torch, case.dtype)
        )

    def _config(self, case: Case) -> Any:
        layer = self._layer(case)
        return importlib.import_module("humming.transform").prepare_layer_config(
            shape_n=case.N,
            shape_k=case.K,
            weight_schema=layer.weight_schema,
            input_schema=layer.input_schema.to_humming_schema(layer.torch_dtype),
            torch_dtype=layer.torch_dtype,
        )

    def _tuning(self, config: Any, case: Case) -> str:
        tune = importlib.import_module("humming.tune")
        return json.dumps(tune.get_heuristics_config(config, shape_m=case.M))


class GemLite(Provider):
    """gemlite, in Triton; tunes itself at the first call, for minutes."""

    name = "gemlite"

    def refusal(self, case: Case) -> str | None:
        if case.op != "matmul" or case.act_order:
            return "forward, groups in order only"
        if case.bits == 3:
            return "1, 2, 4 and 8 bits only"
        return "K must be whole groups" if case.group_size != -1 and case.K % case.group_size else None

    def load(self, weight: PackedWeight, case: Case, copies: int) -> list[Any]:
        core = importlib.import_module("gemlite.core")
        dtype = core.DType.FP16 if case.dtype == "float16" else core.DType.BF16
        layer = core.GemLiteLinear(
            W_nbits=case.bits,
            group_size=case.K if case.group_size == -1 else case.group_size,
            in_features=case.K,
            out_features=case.N,
            input_dtype=dtype,
            output_dtype=dtype,
        )
        codes, scales, zeros = codes_of(weight)
        layer.pack(codes.t().contiguous(), scales.t().contiguous(), zeros.t().to(scales.dtype).contiguous(), None)
        return [(layer, [tensor.clone() for tensor in layer.get_tensor_args()]) for _ in range(copies)]

    def bind(self, layer: Any, x: Tensor, case: Case) -> Callable[[], Tensor]:
        core = importlib.import_module("gemlite.core")
        module, tensors = layer
        meta = module.get_meta_args()
        return lambda: core.forward_functional(x, None, tensors, meta)


def _clone(weight: Any) -> Any:
    """A dataclass with tensors of its own."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight) if field.init}
    return dataclasses.replace(
        weight, **{name: value.clone() for name, value in fields.items() if isinstance(value, Tensor)}
    )


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (Ours(), CuBLAS(), TinyGemm(), Humming(sym=False), Humming(sym=True), GemLite())
}
