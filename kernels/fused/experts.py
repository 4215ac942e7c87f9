# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The experts' kernels: up projection with its activation, down projection with its weight, and the sum per token.

Symbols: T tokens, k slots per token, E experts, H hidden size, I expert size, S = T * k slots, A active experts.

The two projections run on a grid of fixed size. Its programs share out the pairs (active expert, block of columns), A
being read from the plan, so one captured launch serves any set of active experts and no program waits on a dead block.
A program reads the columns of its expert once for each tile of `BLOCK_M` rows, which mostly is once. Every number is
summed by one program in one order: the grid decides who computes it, never how.

Rows of a tile behind the expert's last row are not read: they count as zeros, and are not stored.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    rows,
    columns,
    in_rows,
    in_columns,
    K,
    stride_k,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply rows by columns in float32, `(BLOCK_M, WIDTH)`.

    `rows (BLOCK_M,)` and `columns (WIDTH,)` point to their first elements, `K` long; an element of a column follows the
    last by `stride_k`. Those that are not `in_rows` or `in_columns` are zeros. `UPCAST` is for Triton's interpreter, in
    which bfloat16 would be multiplied bit pattern by bit pattern.
    """
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        row_tile = rows[:, None] + inner[None, :]
        column_tile = columns[None, :] + inner[:, None] * stride_k
        if EVEN_K:
            x = tl.load(row_tile, mask=in_rows[:, None], other=0.0)
        else:
            x = tl.load(row_tile, mask=in_rows[:, None] & (inner < K)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            w = tl.load(column_tile)
        elif EVEN_K:
            w = tl.load(column_tile, mask=in_columns[None, :], other=0.0)
        elif EVEN_N:
            w = tl.load(column_tile, mask=(inner < K)[:, None], other=0.0)
        else:
            w = tl.load(column_tile, mask=in_columns[None, :] & (inner < K)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def _activate(x, FORM: tl.constexpr, SCALE: tl.constexpr):
    """Apply the nonlinearity of a `lynx.kernels.gates.Gate` in float32; "none" is the identity."""
    if FORM == "silu":
        x = x / (1.0 + tl.exp(-SCALE * x))
    elif FORM == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FORM == "gelu_tanh":  # (1 + tanh(y)) / 2 is sigmoid(2y)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif FORM == "relu2":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    else:
        tl.static_assert(FORM == "none")
    return x


@triton.jit
def _clamp_above(x, LIMIT: tl.constexpr):
    return tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["k"])
def gate_up_kernel(
    hidden,  # (T, H), of the weights' dtype
    plan,
    weight,  # (E, C, H), or (E, H, C) if TRANSPOSED; C is 2N if GATED, else N
    bias,  # (E, C), or None
    out,  # (S, N), sorted rows
    k,
    E,
    H,
    N,
    expert_stride,  # elements from one expert's weights to the next's
    FORM: tl.constexpr,
    SCALE: tl.constexpr,
    LIMIT: tl.constexpr,  # None: no clamp
    SHIFT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply each active expert's rows by its up projection and apply the gate.

    A gated tile is one product over gate and up columns together. They are put in pairs where that costs nothing (a
    thread holds neighbours of the product), and side by side where the columns of one half must stay neighbours in
    memory to be read well.
    """
    PAIRED: tl.constexpr = INTERLEAVED or not TRANSPOSED
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    C = 2 * N if GATED else N
    if TRANSPOSED:
        stride_n, stride_k = 1, C
    else:
        stride_n, stride_k = H, 1
    count = tl.load(plan)
    blocks = tl.cdiv(N, BLOCK_N)
    wide = tl.arange(0, WIDTH)
    for item in tl.range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        active = item // blocks
        first = (item % blocks) * BLOCK_N
        expert = tl.load(plan + 1 + active).to(tl.int64)
        start = tl.load(plan + 1 + E + active)
        end = tl.load(plan + 2 + E + active)
        if not GATED:
            column = first + wide
            in_columns = column < N
        elif INTERLEAVED:
            column = 2 * first + wide
            in_columns = column < C
        elif PAIRED:
            column = (wide % 2) * N + first + wide // 2
            in_columns = first + wide // 2 < N
        else:
            column = (wide // BLOCK_N) * N + first + wide % BLOCK_N
            in_columns = first + wide % BLOCK_N < N
        columns = weight + expert * expert_stride + column * stride_n
        if HAS_BIAS:
            shift = tl.load(bias + expert * C + column, mask=in_columns, other=0.0).to(tl.float32)

        for tile in tl.range(start, end, BLOCK_M):
            row = tile + tl.arange(0, BLOCK_M)
            in_rows = row < end
            slot = tl.load(plan + 2 + 2 * E + row, mask=in_rows, other=0)
            rows = hidden + (slot // k) * H
            product = _product(
                rows, columns, in_rows, in_columns, H, stride_k, BLOCK_M, WIDTH, BLOCK_K, EVEN_K, EVEN_N, UPCAST
            )
            if HAS_BIAS:
                product += shift[None, :]
            if GATED:
                if PAIRED:
                    gate, up = tl.split(tl.reshape(product, (BLOCK_M, BLOCK_N, 2)))
                else:
                    gate, up = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
                if LIMIT is not None:
                    gate = _clamp_above(gate, LIMIT)
                    up = -_clamp_above(-_clamp_above(up, LIMIT), LIMIT)
                result = _activate(gate, FORM, SCALE) * (up + SHIFT)
            else:
                result = _activate(product, FORM, SCALE)
            n = first + tl.arange(0, BLOCK_N)
            tl.store(
                out + row[:, None] * N + n[None, :],
                result.to(out.dtype.element_ty),
                mask=in_rows[:, None] & (n < N)[None, :],
            )


@triton.jit
def down_kernel(
    inner,  # (S, I), sorted rows, of the weights' dtype
    plan,
    weight,  # (E, H, I), or (E, I, H) if TRANSPOSED
    bias,  # (E, H), or None
    combine,  # (S,): the weight of each slot
    out,  # (S, H) in float32, sorted rows
    E,
    H,
    I,  # noqa: E741
    expert_stride,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply each active expert's inner rows by its down projection, and by the combine weight of their slot."""
    if TRANSPOSED:
        stride_n, stride_k = 1, H
    else:
        stride_n, stride_k = I, 1
    count = tl.load(plan)
    blocks = tl.cdiv(H, BLOCK_N)
    for item in tl.range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        active = item // blocks
        column = (item % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_columns = column < H
        expert = tl.load(plan + 1 + active).to(tl.int64)
        start = tl.load(plan + 1 + E + active)
        end = tl.load(plan + 2 + E + active)
        columns = weight + expert * expert_stride + column * stride_n
        if HAS_BIAS:
            shift = tl.load(bias + expert * H + column, mask=in_columns, other=0.0).to(tl.float32)

        for tile in tl.range(start, end, BLOCK_M):
            row = tile + tl.arange(0, BLOCK_M)
            in_rows = row < end
            # before the product, which takes long enough for them to arrive
            slot = tl.load(plan + 2 + 2 * E + row, mask=in_rows, other=0)
            share = tl.load(combine + slot, mask=in_rows, other=0.0).to(tl.float32)
            rows = inner + row * I
            product = _product(
                rows, columns, in_rows, in_columns, I, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, UPCAST
            )
            if HAS_BIAS:
                product += shift[None, :]
            product *= share[:, None]
            tl.store(out + row[:, None] * H + column[None, :], product, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["S"])
def combine_kernel(
    rows,  # (S, H) in float32, weighted, sorted
    plan,
    out,  # (T, H)
    E,
    S,
    H,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sum the rows of each token in slot order; slots that were not run are not read."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    place = plan + 2 + 2 * E + S + token * TOP_K
    total = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(TOP_K):  # unrolled: the loads wait for memory together, not one after another
        row = tl.load(place + j)
        # a row that is not there has no columns
        total += tl.load(rows + row * H + column, mask=column < tl.where(row >= 0, H, 0), other=0.0)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)
