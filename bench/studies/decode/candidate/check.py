"""Checks the decode kernel on a GPU, then times it: `python check.py [seconds]`; JSON to $OUT/decode_check.json after every row.

Correctness first: float64 product with the dequantized weight, fresh random inputs, NaN-poisoned y and workspace, two launches
bit for bit equal, counters back at zero. Timing: CUDA-graph replay over rotating cold copies (> 200 MB), medians, read bandwidth
measured in the same process.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from itertools import product

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(1, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import torch
import triton
from decode import SMALL, TILES, choose, decode
from layout import pack_meta, tile
from rd import read_bw

START, LIMIT = time.time(), float(sys.argv[1]) if len(sys.argv) > 1 else 90.0
OUT = os.environ.get("OUT", "/tmp")
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672))


def padded(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple:
    K, N = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -N % 16, 0, -K % 128))
    pad = (0, -N % 16)
    return codes, torch.nn.functional.pad(scales, pad), torch.nn.functional.pad(zeros, pad)


def check(M, N, K, bits, dtype, group, plan, with_bias) -> dict:
    G = 1 if group == -1 else -(-K // group)
    codes = torch.randint(0, 1 << bits, (K, N), device="cuda")
    scales = (torch.rand(G, N, device="cuda") * 0.02 + 0.01).to(dtype)
    zeros = torch.randint(0, (1 << bits) + 1, (G, N), device="cuda")
    x = torch.randn(M, K, device="cuda").to(dtype)
    bias = torch.randn(N, device="cuda").to(dtype) if with_bias else None
    g = torch.arange(K, device="cuda") // (K if group == -1 else group)
    ref = x.double() @ ((codes - zeros[g]) * scales[g].double())
    if bias is not None:
        ref += bias.double()
    pc, ps, pz = padded(codes, scales, zeros)
    words, top = tile(pc, bits)
    meta = pack_meta(ps, pz)
    counters = torch.zeros(4096, device="cuda", dtype=torch.int32)
    ys = []
    for _ in range(2):
        y = torch.full((M, N), math.nan, device="cuda", dtype=dtype)
        ws = torch.full((plan.split, M, meta.shape[1]), math.nan, device="cuda")
        decode(x, words, top, meta, bias, y, ws, counters, bits=bits, group_size=group, scales_bf16=dtype == torch.bfloat16, plan=plan)
        ys.append(y)
    torch.cuda.synchronize()
    err = ((ys[0].double() - ref).norm() / ref.norm()).item()
    rounding = ((ref.to(dtype).double() - ref).norm() / ref.norm()).item()
    same = torch.equal(ys[0].view(torch.int16), ys[1].view(torch.int16)) and int(counters.abs().max()) == 0
    return dict(M=M, N=N, K=K, bits=bits, dtype=str(dtype), group=group, bias=with_bias, plan=asdict(plan), err=err, rounding=rounding, same=same, ok=err < 1.2 * rounding and same)


def graph_us(functions, repeats=15) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for f in functions[:2]:
            f()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in functions:
            f()
    graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / len(functions))
    return sorted(times)[len(times) // 2]


result = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, checks=[], rows=[])


def save():
    json.dump(result, open(f"{OUT}/decode_check.json", "w"), indent=0)


torch.manual_seed(int(time.time()))
for bits, dtype in product((4, 3, 8, 2), (torch.float16, torch.bfloat16)):
    for bm in (8, 16):
        plans = [replace(TILES[bm][bits][0], split=3), TILES[bm][bits][0], replace(SMALL[bm], split=2)]
        cases = [(bm - 1, 1024, 128 * 37, 128, plans[0], False), (1 if bm == 8 else 9, 1000, 4096, 256, plans[1], True), (bm, 528, 1536 + 48, -1, plans[2], True)]
        for M, N, K, group, plan, with_bias in cases:
            try:
                row = check(M, N, K, bits, dtype, group, plan, with_bias)
            except Exception as e:  # noqa: BLE001 - a driver: record and go on
                row = dict(M=M, N=N, K=K, bits=bits, dtype=str(dtype), group=group, plan=asdict(plan), ok=False, error=repr(e)[:400])
            result["checks"].append(row)
            if not row["ok"]:
                print("BAD", {k: v for k, v in row.items() if k != "plan"}, flush=True)
print(f"checks {len(result['checks'])}, bad {sum(not c['ok'] for c in result['checks'])} [{time.time() - START:.0f}s]", flush=True)
save()
bandwidth = result["read_gbps"] = read_bw()
print(f"read {bandwidth:.0f} GB/s", flush=True)
counters = torch.zeros(1 << 14, device="cuda", dtype=torch.int32)
for (N, K), bits in product(SHAPES, (4, 8, 3, 2)):
    if time.time() - START > LIMIT:
        print("out of time")
        break
    copies = max(2, min(64, math.ceil(220e6 / (N * K * bits / 8))))
    low = 2 if bits == 3 else bits
    words = [torch.randint(-(2**31), 2**31 - 1, (N * K * low // 32,), device="cuda", dtype=torch.int32) for _ in range(copies)]
    tops = [torch.randint(-(2**31), 2**31 - 1, (N * K // 32,), device="cuda", dtype=torch.int32) for _ in range(copies)] if bits == 3 else [None] * copies
    metas = [pack_meta((torch.rand(K // 128, N, device="cuda") * 0.01).half(), torch.randint(0, 1 << bits, (K // 128, N), device="cuda")) for _ in range(copies)]
    for M in (1, 2, 4, 8, 16):
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        y = torch.empty(M, N, device="cuda", dtype=torch.float16)
        plan = choose(M, N, K, bits)
        ws = torch.empty(plan.split, M, N, device="cuda")
        calls = [lambda w=w, t=t, m=m: decode(x, w, t, m, None, y, ws, counters, bits=bits, group_size=128, scales_bf16=False, plan=plan) for w, t, m in zip(words, tops, metas)]
        while len(calls) < 8:
            calls = calls + calls
        us = graph_us(calls)
        floor = (N * K * bits / 8 + K // 128 * N * 4 + 2 * M * (K + N)) / bandwidth / 1e3
        result["rows"].append(dict(N=N, K=K, bits=bits, M=M, us=us, floor_us=floor, of_floor=floor / us, plan=asdict(plan)))
        if M in (1, 8, 16):
            print(f"{N}x{K} w{bits} M={M}: {us:.2f} us, {floor / us:.2f} of the floor", flush=True)
    save()
