"""Runs the unpack PTX on the CPU, instruction by instruction, against the layout: no GPU needed."""
import re

import torch

from layout import tile
from unpack import OFFSETS, UNIT, _hex16, unpack_asm

M32 = 0xFFFFFFFF


def halves(v, bf):
    t = torch.stack((v & 0xFFFF, v >> 16), -1)
    t = torch.where(t >= 1 << 15, t - (1 << 16), t).to(torch.int16)
    return t.view(torch.bfloat16 if bf else torch.float16).double()


def words(f, bf):
    t = f.to(torch.bfloat16 if bf else torch.float16).view(torch.int16).long() & 0xFFFF
    return t[..., 0] | (t[..., 1] << 16)


def run(asm, n, inputs, bf):
    env = {f"${n + i}": v for i, v in enumerate(inputs)}
    val = lambda o: env[o] if o in env else int(o, 0)
    for line in asm.replace("{", "").replace("}", "").replace(";", ";\n").splitlines():
        line = line.strip().rstrip(";")
        if not line or line.startswith(".reg"): continue
        op, rest = line.split(" ", 1); a = [v.strip() for v in rest.split(",")]
        if op == "lop3.b32": env[a[0]] = (val(a[1]) & val(a[2])) | val(a[3]); assert a[4] == "0xea"
        elif op == "shf.r.wrap.b32": s = int(a[3]); assert a[1] == a[2]; env[a[0]] = ((val(a[1]) >> s) | (val(a[1]) << (32 - s))) & M32
        elif op == "shr.b32": env[a[0]] = val(a[1]) >> int(a[2])
        elif op.startswith("sub."): env[a[0]] = words(halves(val(a[1]), bf) - halves(val(a[2]), bf), bf)
        else: raise ValueError(op)
    return [halves(env[f"${i}"], bf) for i in range(n)]


for bits in (8, 4, 3, 2):
    for bf in (False, True):
        q = torch.randint(0, 1 << bits, (256, 32)); K, N = q.shape; z = int(torch.randint(0, (1 << bits) + 1, ()))
        w, t = tile(q, bits); w = w.long() & M32; asm, con, n = unpack_asm(bits, bf); u = UNIT[bits, bf]
        assert len(con.split(",")) == n + (4 if bits == 3 else 2) + 2 * sum(map(len, OFFSETS[bits, bf])), con
        if bits == 8 and bf:
            c = [1 + (z & 15) / 32 if z < 256 else 1.0, 16 + (z >> 4) / 2] * 2
        else:
            c = [o + z * u for r8 in range(2) for o in OFFSETS[bits, bf][r8]]
        cw = [words(torch.tensor([v, v]).double(), bf) for v in c]
        assert all(halves(x, bf)[0] == v for x, v in zip(cw, c)), "a subtrahend is not exact"
        cw = [x for x in cw for _ in range(2)]
        S, T = w.shape[:2]; w = w.view(S, T, 8, 4, 2, 2)  # g t w1 w0
        for w1 in range(2):
            ins = [w[..., w1, 0], w[..., w1, 1]] + ([(t.long() & M32).view(S, T, 8, 4, 2)[..., w1]] * 2 if bits == 3 else []) + cw
            out = run(asm, n, ins, bf)
            if bits == 8 and bf: out = [out[i] + out[i + 1] for i in range(0, n, 2)]
            out = torch.stack(out, -2)  # S T g t field h
            kt = {8: 32, 4: 64, 3: 128, 2: 128}[bits]; f = q.t().reshape(S, 2, 8, T, kt // 16, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)  # S T g t step k3 r8 h
            steps = kt // 32; ref = (f[:, :, :, :, w1 * steps:(w1 + 1) * steps].reshape(S, T, 8, 4, -1, 2) - z).double() * u
            assert torch.equal(out, ref), (bits, bf, w1)
        print(bits, "bf16" if bf else "fp16", "exact", "lop3", asm.count("lop3"), "shifts", asm.count("sh"), "sub", asm.count("sub"), "for", ref.shape[-2] * 2, "weights a lane")
