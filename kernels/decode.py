"""``y = x @ W + bias`` for up to 16 rows of x, as fast as the weight arrives. Gluon, NVIDIA from sm_80 on.

    y[m, n] = bias[n] + sum_g scales[g, n] * unit[m, g] * (sum_k codes[k, n] q[m, k] - zeros[g, n] sum_k q[m, k])

where x = unit * q in two signed digits (digits.py): sums over 128 columns are exact integers, all else is fp32. Up to
four rows of x every program may find the digits itself, while its first words are on their way; else they come from a
launch before. Codes go from memory straight to the registers that feed the tensor cores, one mask for four codes
(integer_ptx.py); they never touch shared memory. A warp loads DEPTH rounds ahead, and nothing that it does not use: a
program ends when all its loads have arrived. Programs of eight warps or fewer leave room for those of the next launch,
whose words are on their way before these end. A program owns 16 * STRIPS * WARPS_N rows of W and one of several ranges
of k; its warps form a grid of WARPS_N (strips) by WARPS_K (interleaved steps of 128 columns). Partial sums meet in
shared memory, then in a workspace, where one program waits for those of the others and adds them in a fixed order.
Where tiles come out unevenly, there are as many programs as multiprocessors, with equal shares of all tiles.

Where a step has two or four groups there are two forms. A column of a product is a digit of a row of x within one
group, 0 elsewhere: each lane has the sums of its own group, those of a row's lanes meet at the end, and a tile has two
rows or one. Or groups have their products in turn: more scales and sums for a lane, but a tile keeps its four rows.

Dispatch picks it for M <= 16 and scales of 16 bits. Source: this project.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# (Gluon's own types are constexprs here and tensors there)

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .common import (
    FENCE,
    LAUNCH_DEPENDENTS,
    WAIT_FOR_EARLIER,
    Text,
    add_parts,
    arrive,
    barrier,
    bits_of,
    do,
    linear,
    load_meta,
    load_words,
    scales_and_zeros,
    share,
    sharers,
    unpack,
    wait_for,
)
from .launch import Launch, prepare
from .own_digits import Halves, load_order, wrapped, write_digits


@gluon.jit
def _pieces(t, COUNT: gl.constexpr, WARPS_K: gl.constexpr):
    """[WARPS_K, n, COUNT] to COUNT tensors [WARPS_K, n]."""
    out = (t,)
    for level in gl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for i in gl.static_range(1 << level):
            piece = out[i]
            if COUNT >> level > 2:
                # the first half of what is left, then the second
                piece = piece.reshape((WARPS_K, t.shape[1], 2, COUNT >> (level + 1))).permute((0, 1, 3, 2))
            halves = halves + gl.split(piece)
        out = halves
    return out


@gluon.jit
def _every_strip(t, L: gl.constexpr, SHAPE: gl.constexpr):
    t = gl.convert_layout(t, gl.SliceLayout(1, L), assert_trivial=True)
    return gl.expand_dims(t, 1).broadcast_to(SHAPE)


@gluon.jit
def _every_g(t, GL: gl.constexpr):
    """A number for each t, [WARPS_K, 4], to one for each lane 4 g + t, [WARPS_K, 32]."""
    t = gl.convert_layout(t, gl.SliceLayout(1, GL), assert_trivial=True)
    return gl.expand_dims(t, 1).broadcast_to((t.shape[0], 8, 4)).reshape((t.shape[0], 32))


@gluon.jit
def _pointers(
    words_ptr, meta_ptr, tile, strips, strip_words, S: gl.constexpr, SUBGROUPS: gl.constexpr, L: gl.constexpr
):  # fmt: skip
    """To the words and the meta of each lane for the first step of a tile's strips, [1, S, 32]."""
    LS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L))
    LL: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, L))
    strip = gl.expand_dims(gl.expand_dims(gl.minimum(tile * S + gl.arange(0, S, LS), strips - 1), 0), 2)
    lane = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, LL), 0), 1)
    meta_ptr += lane % SUBGROUPS * strips * 16  # of the subgroup whose sums a lane has
    return words_ptr + strip.to(gl.int64) * strip_words + lane * 4, meta_ptr + strip * 16 + lane // 4 * 2


@gluon.jit
def _steps(first, WARPS_K: gl.constexpr, S: gl.constexpr, L: gl.constexpr):
    """The step of each warp in the round that begins with step first, [WARPS_K, S, 32]."""
    LK: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    step = gl.expand_dims(gl.expand_dims(gl.arange(0, WARPS_K, LK), 1), 2) + first
    return step + gl.zeros((WARPS_K, S, 32), gl.int32, L)


@gluon.jit
def _step(
    acc, q, meta, digits, sums, T: gl.constexpr, TILES: gl.constexpr, TURNS: gl.constexpr, WARPS_K: gl.constexpr,
    DL: gl.constexpr, UL: gl.constexpr, GL: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """acc += scale * unit * ((code - zero) . q) over 128 columns."""
    SHAPE: gl.constexpr = q[0].shape
    a = q if T.as_they_are else unpack(q, T)
    groups = ()
    for turn in gl.static_range(TURNS):
        groups = groups + (scales_and_zeros(meta[turn], T),)
    out = ()
    for tile in gl.static_range(TILES):
        b = digits.slice(2 * tile, 2, dim=1).load(DL)  # [WARPS_K, 2, 128]
        b = b.reshape((WARPS_K, 2, 32, 4)).permute((0, 2, 1, 3)).reshape((WARPS_K, 32, 8))
        args = a
        for i in gl.static_range(8):
            args = args + (_every_strip(_pieces(b, 8, WARPS_K)[i], L, SHAPE),)
        # the unit, and a sum for each turn; what is beyond them is nothing
        numbers = _pieces(sums.slice(tile, 1, dim=1).load(UL).reshape((WARPS_K, 4, 2 * TURNS)), 2 * TURNS, WARPS_K)
        for turn in gl.static_range(TURNS):
            args = args + groups[turn] + (_every_strip(_every_g(numbers[1 + turn], GL), L, SHAPE),)
        unit = _every_g(numbers[0], GL).to(gl.float32, bitcast=True)
        args = args + (_every_strip(unit, L, SHAPE), acc[2 * tile], acc[2 * tile + 1])
        out = out + gl.inline_asm_elementwise(
            T.product, T.product_constraints, args, dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )
    return out


@gluon.jit
def _copy_chunk(
    digits, sums, digits_ptr, sums_ptr, digit_offs, sum_offs, row, sum_row, first, end, TILES: gl.constexpr
):  # fmt: skip
    """Start copying the digits and sums of steps first ... end, as many as there is room for, to shared memory."""
    present = gl.expand_dims(row // TILES + first < end, 1)
    async_copy.async_copy_global_to_shared(
        digits, digits_ptr + first * TILES * digits.shape[1] + digit_offs, mask=present
    )
    present = sum_row // TILES + first < end
    async_copy.async_copy_global_to_shared(sums, sums_ptr + first * TILES * sums.shape[1] + sum_offs, mask=present)
    async_copy.commit_group()


@gluon.jit(
    do_not_specialize=["M", "N", "K", "steps", "strips", "stride_xm", "stride_ym"],
    do_not_specialize_on_alignment=["x_ptr", "bias_ptr"],
)
def decode_kernel(
    x_ptr, order_ptr, digits_ptr, sums_ptr, words_ptr, meta_ptr, bias_ptr, y_ptr, workspace_ptr, counters_ptr,
    M, N, K, steps, strips, stride_xm, stride_ym,
    T: gl.constexpr, TILES: gl.constexpr, STRIPS: gl.constexpr, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr,
    DEPTH: gl.constexpr, CHUNK: gl.constexpr, SPLITS: gl.constexpr, GROUP_STEPS: gl.constexpr, SUBGROUPS: gl.constexpr,
    TURNS: gl.constexpr, PERSISTENT: gl.constexpr, PDL: gl.constexpr, OWN_ROWS: gl.constexpr, PAIRS: gl.constexpr,
    X: gl.constexpr, L: gl.constexpr, DL: gl.constexpr, UL: gl.constexpr, GL: gl.constexpr, CL: gl.constexpr,
    SL: gl.constexpr, YL: gl.constexpr, XL: gl.constexpr, TL: gl.constexpr, OL: gl.constexpr, RL: gl.constexpr,
    NUMBERS: gl.constexpr,
):  # fmt: skip
    """One tile of y, or of a partial sum, a program; if PERSISTENT one after another, words of the next in flight.

    With SPLITS too, programs have equal shares of the rounds of all tiles, which begin and end anywhere in a tile.
    With OWN_ROWS, rows of x, a program finds the digits of all its steps itself; else they come in chunks.
    """
    S: gl.constexpr = STRIPS * WARPS_N
    WIDTH: gl.constexpr = 8 * TURNS  # of the sums of a step and tile
    LANES: gl.constexpr = 32 // SUBGROUPS  # with sums of their own: those over subgroups meet
    TILE: gl.constexpr = 4 // SUBGROUPS  # rows of x
    ROWS: gl.constexpr = CHUNK * WARPS_K * TILES

    # Which tiles are mine: strips S * tile ..., rounds lo ... hi of WARPS_K steps
    EVEN: gl.constexpr = PERSISTENT and SPLITS
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    pid_k = gl.program_id(1)
    split = gl.num_programs(1)
    tiles_n = (strips + S - 1) // S
    rounds = (steps + WARPS_K - 1) // WARPS_K
    if EVEN:
        mine_from, mine_to = share(pid, programs, tiles_n, rounds)
        tile_from = mine_from // rounds
        tile_to = (mine_to + rounds - 1) // rounds
        tile_by = 1
        lo = mine_from - tile_from * rounds
        hi = gl.minimum(mine_to - tile_from * rounds, rounds)
    else:
        tile_from = pid
        tile_to = tiles_n
        tile_by = programs
        lo = rounds * pid_k // split
        hi = rounds * (pid_k + 1) // split
    end = gl.minimum(hi * WARPS_K, steps)
    last = end - 1
    if EVEN:
        end = steps  # of digits, which the next tile goes on with

    # First pointers
    step = _steps(lo * WARPS_K, WARPS_K, S, L)
    q_ptrs, m_ptrs = _pointers(words_ptr, meta_ptr, tile_from, strips, steps * T.step_words, S, SUBGROUPS, L)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SIDES: gl.constexpr = 1 if OWN_ROWS else 2
    digits = gl.allocate_shared_memory(gl.int32, [SIDES * CHUNK, WARPS_K, 2 * TILES, 128], PLAIN)
    sums = gl.allocate_shared_memory(gl.int32, [SIDES * CHUNK, WARPS_K, TILES, WIDTH], PLAIN)
    if not OWN_ROWS:
        row = gl.arange(0, ROWS, gl.SliceLayout(1, CL))
        digit_offs = gl.expand_dims(row, 1) * 256 + gl.expand_dims(gl.arange(0, 256, gl.SliceLayout(0, CL)), 0)
        sum_row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, SL)), 1)
        sum_offs = sum_row * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, SL)), 0)
        digit_chunks = digits._reinterpret(gl.int32, [SIDES, ROWS, 256], FLAT)
        sum_chunks = sums._reinterpret(gl.int32, [SIDES, ROWS, WIDTH], FLAT)
    q = ()
    meta = ()
    for d in gl.static_range(DEPTH):
        q = q + (load_words(q_ptrs, step, last, T),)
        meta = meta + (load_meta(m_ptrs, step, last, strips, SUBGROUPS, TURNS, GROUP_STEPS),)
        step += WARPS_K
    PASS: gl.constexpr = 2 * WARPS_N * WARPS_K
    first = lo * WARPS_K
    around = rounds * WARPS_K if EVEN else None
    order = None
    if order_ptr is not None:
        order = load_order(order_ptr, first, end, around, ROWS // PASS, PASS, OL)
    if PDL:
        do(WAIT_FOR_EARLIER)  # the weight is on its way; digits and workspace belong to the kernels before
        do(LAUNCH_DEPENDENTS)  # what follows may count on those kernels without waiting for this one
    lo_of_digits = lo
    if OWN_ROWS:
        write_digits(
            digits, sums, x_ptr, order, first, end, around, K, stride_xm,
            OWN_ROWS, ROWS // PASS, PASS, SUBGROUPS, PAIRS, X, XL, TL, RL, NUMBERS,
        )  # fmt: skip
        barrier()
    else:
        _copy_chunk(
            digit_chunks.index(0), sum_chunks.index(0), digits_ptr, sums_ptr,
            digit_offs, sum_offs, row, sum_row, first, end, TILES,
        )  # fmt: skip
    partial = gl.allocate_shared_memory(gl.float32, [2 * TILES, WARPS_K, S * LANES], FLAT)
    # The tile that words are loaded for, how many rounds of it there are, and how many are on their way
    ahead_tile = tile_from
    padded = (hi - lo + DEPTH - 1) // DEPTH * DEPTH
    ahead = DEPTH
    side = 0
    for tile in range(tile_from, tile_to, tile_by):
        if EVEN:
            lo = gl.maximum(mine_from - tile * rounds, 0)
            hi = gl.minimum(mine_to - tile * rounds, rounds)
        acc = ()
        for _ in gl.static_range(2 * TILES):
            acc = acc + (gl.zeros((WARPS_K, S, 32), gl.float32, L),)

        # The loop over k: chunks of CHUNK rounds of digits, rounds of WARPS_K steps
        for chunk in range(lo, hi, CHUNK):
            if not OWN_ROWS:
                async_copy.wait_group(0)
                barrier()
                first = (chunk + CHUNK) * WARPS_K
                if PERSISTENT:
                    first = gl.where(chunk + CHUNK < hi, first, 0)  # of the next tile
                _copy_chunk(
                    digit_chunks.index(1 - side), sum_chunks.index(1 - side), digits_ptr, sums_ptr,
                    digit_offs, sum_offs, row, sum_row, first, end, TILES,
                )  # fmt: skip
                barrier()  # before the first read of the chunk, or the compiler adds one to every round
            n = gl.minimum(CHUNK, hi - chunk)
            place = side * CHUNK
            if EVEN and OWN_ROWS:
                place = (lo - lo_of_digits + rounds) % rounds
            for i in range(0, n, DEPTH):
                if PERSISTENT and ahead == padded:
                    ahead = 0
                    ahead_tile += tile_by
                    step = _steps(0, WARPS_K, S, L)
                    q_ptrs, m_ptrs = _pointers(
                        words_ptr, meta_ptr, ahead_tile, strips, steps * T.step_words, S, SUBGROUPS, L
                    )
                    if EVEN:
                        left = gl.maximum(gl.minimum(mine_to - ahead_tile * rounds, rounds), 0)
                        padded = (left + DEPTH - 1) // DEPTH * DEPTH
                        last = gl.minimum(left * WARPS_K, steps) - 1
                    else:
                        last = gl.where(ahead_tile < tiles_n, last, -1)
                for d in gl.static_range(DEPTH):
                    if i + d < n:  # this branch and the fence below keep ptxas from sinking the loads
                        stage = wrapped(place + i + d, rounds if EVEN and OWN_ROWS else None)
                        acc = _step(
                            acc,
                            q[d],
                            meta[d],
                            digits.index(stage),
                            sums.index(stage),
                            T,
                            TILES,
                            TURNS,
                            WARPS_K,
                            DL,
                            UL,
                            GL,
                            L,
                        )
                    q = q[:d] + (load_words(q_ptrs, step, last, T),) + q[d + 1 :]
                    meta = (
                        meta[:d]
                        + (load_meta(m_ptrs, step, last, strips, SUBGROUPS, TURNS, GROUP_STEPS),)
                        + meta[d + 1 :]
                    )
                    step += WARPS_K
                    do(FENCE)
                ahead += DEPTH
            side = (SIDES - 1) - side

        # Epilogue: add the WARPS_K partial sums, then those of all programs in a fixed order
        for c in gl.static_range(2 * TILES):
            part = acc[c] * T.higher if c % 2 else acc[c]
            partial.index(c).store(gl.sum(part.reshape((WARPS_K, S * LANES, SUBGROUPS)), 2))
        barrier()
        offs_j = gl.arange(0, S * LANES, gl.SliceLayout(0, YL))
        ys = ()
        for c in gl.static_range(2 * TILES):
            ys = ys + (gl.sum(partial.index(c).load(YL), 0),)
        mine = True
        if SPLITS:
            # One of a tile's programs has the others' sums: with equal shares the one that begins it, as others go on
            # with it at once; else the last, which runs when all others do or have
            PART: gl.constexpr = 2 * TILES * S * LANES
            if EVEN:
                first_sharer, parts = sharers(tile, programs, tiles_n, rounds)
                mine = pid == first_sharer
                part, others, by = pid, first_sharer + 1, 1
            else:
                parts = split
                mine = pid_k == split - 1
                part, others, by = pid_k * tiles_n + tile, tile, tiles_n
            part_ptr = workspace_ptr + offs_j
            if not mine:
                for c in gl.static_range(2 * TILES):
                    gl.store(part_ptr + part * PART + c * S * LANES, ys[c])
                arrive(counters_ptr + tile)
            elif parts > 1:
                wait_for(counters_ptr + tile, parts - 1)
                ys = add_parts(ys, part_ptr + others * PART, by * PART, parts - 1, S * LANES)
                barrier()
                gl.store(counters_ptr + tile, 0)
        if mine:
            for c in gl.static_range(2 * TILES):
                y = ys[c]
                # row g + 8 r8 of a strip and row m of a tile of x
                offs_n = (tile * S + offs_j // LANES) * 16 + 8 * (c % 2) + offs_j % LANES // TILE
                offs_m = TILE * (c // 2) + offs_j % TILE
                if bias_ptr is not None:
                    y += gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
                y_ptrs = y_ptr + offs_m.to(gl.int64) * stride_ym + offs_n
                gl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < M) & (offs_n < N))
    if not OWN_ROWS:
        async_copy.wait_group(0)


@functools.cache
def constants(
    bits: int, scales_bf16: bool, tiles: int, strips: int, warps_n: int, warps_k: int, depth: int, chunk: int,
    splits: bool, persistent: bool, group_columns: int, pdl: bool, own_rows: int = 0,
    bf16: bool = False, pairs: bool = False, in_turn: bool = False, numbers: int = 0,
) -> dict:  # fmt: skip
    """The constexpr arguments of the kernel for a plan."""
    groups = max(1, 128 // group_columns)
    subgroups, turns = (1, groups) if in_turn else (groups, 1)
    S = strips * warps_n
    warps = warps_n * warps_k
    chains = 2 if tiles == turns == 1 and warps <= 8 else 1  # where there are no other products to go on with
    # strips go to warps first, then to registers; what does not depend on the strip is the same in those warps
    here = bits_of(S)[: warps_n.bit_length() - 1]
    rest = bits_of(S)[warps_n.bit_length() - 1 :]
    same = [[0, 0, 0] for _ in here]
    in_k = [[k, 0, 0] for k in bits_of(warps_k)]
    return {
        "T": Text(bits, scales_bf16, warpgroup=False, turns=turns, chains=chains), "TILES": tiles, "STRIPS": strips,
        "WARPS_N": warps_n, "WARPS_K": warps_k, "DEPTH": depth, "CHUNK": chunk, "SPLITS": splits,
        "PERSISTENT": persistent,
        "GROUP_STEPS": max(1, group_columns // 128),
        "SUBGROUPS": subgroups, "TURNS": turns, "PDL": pdl, "OWN_ROWS": own_rows, "PAIRS": pairs, "X": Halves(bf16),
        "L": linear(
            [[0, s, 0] for s in rest], [[0, 0, b] for b in bits_of(32)], [[0, s, 0] for s in here] + in_k,
            [warps_k, S, 32],
        ),
        "DL": linear(
            [[0, 0, 1], [0, 0, 2], [0, 1, 0]], [[0, 0, 4 * b] for b in bits_of(32)], same + in_k, [warps_k, 2, 128]
        ),
        "UL": linear(
            [[0, 0, b] for b in bits_of(2 * turns)], [[0, 0, 2 * turns], [0, 0, 4 * turns]] + [[0, 0, 0]] * 3,
            same + in_k, [warps_k, 1, 8 * turns],
        ),
        "GL": linear(
            [], [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]], same + in_k, [warps_k, 8, 4]
        ),
        "CL": gl.BlockedLayout([1, 4], [1, 32], [warps, 1], [1, 0]),
        "SL": gl.BlockedLayout([1, 4], [16 // turns, 2 * turns], [warps, 1], [1, 0]),
        "YL": gl.BlockedLayout([warps_k, 1], [1, 32], [1, warps], [1, 0]),
        # a lane has eight columns of a step, whole words of digits; a warp has two steps
        "XL": linear(
            [], [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]], [[2 * b, 0] for b in bits_of(warps)], [2 * warps, 16]
        ),
        "TL": linear(
            [[0, 0, 1]] + [[0, b, 0] for b in bits_of(subgroups)], [[0, 0, 0]] * 4 + [[1, 0, 0]],
            [[2 * b, 0, 0] for b in bits_of(warps)], [2 * warps, subgroups, 2],
        ),
        # the same columns, in a row
        "OL": linear(
            [[1], [8], [16]], [[2], [4], [32], [64], [128]], [[256 * b] for b in bits_of(warps)], [256 * warps]
        ),
        "RL": gl.BlockedLayout([1], [32], [warps], [0]), "NUMBERS": numbers,
    }  # fmt: skip


def prepare_decode(
    device: int, dtype: torch.dtype, bias: torch.dtype | None, *, bits: int, scales_bf16: bool, group_columns: int,
    tiles: int, strips: int, warps_n: int, warps_k: int, depth: int, chunk: int, split: int,
    persistent: bool, pdl: bool, in_turn: bool = False, own_rows: int = 0, aligned: bool = False, numbers: int = 0,
) -> Launch:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of y: float16, bfloat16 or float32.
        bias: Its dtype, or None.
        bits: 2, 3, 4 or 8.
        scales_bf16: Whether scales are bfloat16, not float16.
        group_columns: Columns that share a scale: 32, 64 or a multiple of 128.
        tiles: Of x, of four rows, or two or one where a step has two or four groups, not in turn: 1, 2 or 4.
        strips: Strips of 16 rows of W to a warp.
        warps_n: Warps over strips.
        warps_k: Warps over steps.
        depth: Rounds of words in flight.
        chunk: Rounds of digits staged at a time, a multiple of depth; with own_rows all of a program's rounds.
        split: Programs over k.
        persistent: A program takes one tile after another.
        pdl: Programmatic dependent launch (sm_90 on).
        in_turn: Groups of a step have products of their own, not columns.
        own_rows: M, at most one tile, if programs find the digits of x, else 0; not with in_turn.
        aligned: K is even, and rows of x start at multiples of 4 bytes (with own_rows).
        numbers: A power of two, K or more, if x has columns in another order (with own_rows), else 0.

    Returns:
        ``launch(programs, split, stream, x, order, digits, sums, words, meta, bias, y, workspace, counters, M, N, K,
        steps, all_strips, stride_xm, stride_ym)``, with ``programs = ceil(all_strips / (strips * warps_n))``:

        - x: (M, K), unit stride along K, of dtype; None without own_rows.
        - order: int32 (steps * 128,), the column of x for each column of the tiles, -1 for 0; None without numbers.
        - digits, sums: as digits.py writes them; None with own_rows.
        - words: int32 (all_strips, steps, 64 * bits).
        - meta: int32 (groups, all_strips * 16), scales of 16 bits above zero points.
        - bias: (N,), or None. y: (M, N), unit stride along N, M at most the rows of all tiles; overwritten.
        - workspace: float32, (split - 1) * programs * 16 * strips * warps_n elements for each row of the tiles; with
          equal shares ``programs`` is as many as there are, and split 2. None when split is 1.
        - counters: int32, a zero for each of ceil(all_strips / (strips * warps_n)) tiles, left at zero; None when split
          is 1.
    """
    names = constants(
        bits, scales_bf16, tiles, strips, warps_n, warps_k, depth, chunk, split > 1, persistent, group_columns, pdl,
        own_rows, dtype == torch.bfloat16, aligned, in_turn, numbers,
    )  # fmt: skip
    order = torch.int32 if numbers else None
    rows = (dtype, order, None, None) if own_rows else (None, None, torch.int32, torch.int32)
    meeting = (torch.float32, torch.int32) if split > 1 else (None, None)
    pointers = (*rows, torch.int32, torch.int32, bias, dtype, *meeting)
    return prepare(decode_kernel, device, pointers, names, num_warps=warps_n * warps_k, launch_pdl=pdl)
