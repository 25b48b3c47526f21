"""h[t] = a[t] h[t-1] + x[t] in Triton: tiles of time in parallel, the state handed from tile to tile in one launch.

A program has TT steps of DD channels in registers: it scans them from 0, publishes the product of its gates and the
state it ends in, waits for what came before it, and writes. Every number is read once. Which sums are formed, and in
which order, depends on the shape alone: results are the same bits in every run.

B rows, T steps of a row, D channels; N documents; W the precision of the arithmetic. An operand is a tuple (pointer,
stride of rows, stride of steps), channels being neighbours; positions count from the row's first step in memory, steps
in the order of the scan.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tiles that add up what those before them in the group published; the group's last hands on the state itself.
GROUP = tl.constexpr(8)
# What a tile publishes: (gates' product, end state) twice for complex numbers, and the state before the next group.
SLOTS = tl.constexpr(6)


@triton.jit
def _real(a, x, b, y):
    return b * a, b * x + y


@triton.jit
def _complex(a, a_im, x, x_im, b, b_im, y, y_im):
    return (
        b * a - b_im * a_im,
        b * a_im + b_im * a,
        b * x - b_im * x_im + y,
        b * x_im + b_im * x + y_im,
    )


@triton.jit
def times(a, a_im, b, b_im, COMPLEX: tl.constexpr):
    """a·b; imaginary parts of real numbers are whatever they are."""
    if COMPLEX:
        return a * b - a_im * b_im, a * b_im + a_im * b
    else:
        return a * b, a * b


@triton.jit
def tile_scan(a, a_im, x, x_im, COMPLEX: tl.constexpr, BACKWARDS: tl.constexpr):
    """Products of gates and states from 0, both after every step of a tile (TT, DD); backwards from its last step."""
    if COMPLEX:
        return tl.associative_scan((a, a_im, x, x_im), 0, _complex, reverse=BACKWARDS)
    else:
        product, state = tl.associative_scan((a, x), 0, _real, reverse=BACKWARDS)
        return product, product, state, state


@triton.jit
def row(x, n: tl.constexpr, TT: tl.constexpr):
    """The n-th row of a tile (TT, DD)."""
    return tl.sum(tl.where(tl.arange(0, TT)[:, None] == n, x, 0.0), 0)


@triton.jit
def neighbour(x, edge, STEP: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr):
    """Of every row the row STEP (-1 or 1) further; `edge` (DD,) where that is outside the tile."""
    t = tl.broadcast_to(tl.arange(0, TT)[:, None] + STEP, (TT, DD))
    inside = (t >= 0) & (t < TT)
    moved = tl.gather(x, tl.minimum(tl.maximum(t, 0), TT - 1), 0)
    return tl.where(inside, moved, tl.broadcast_to(edge[None, :], (TT, DD)))


@triton.jit
def place(T, D, rows, REVERSE: tl.constexpr, AGAINST: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr):
    """What a program works on: row, tile, which tile in the order of work, block; steps (TT, 1), the position of the
    tile's first step and others relative to it (TT, 1), channels (1, DD).

    Programs are numbered tile by tile, so that those waited for are started first. AGAINST: from the last tile on.
    """
    blocks = tl.cdiv(D, DD)
    tiles = tl.cdiv(T, TT)
    program = tl.program_id(0)
    order = program // (rows * blocks)
    tile = tiles - 1 - order if AGAINST else order
    part = program % (rows * blocks)
    steps = tl.arange(0, TT)[:, None]
    start = tile * TT
    d = (part % blocks) * DD + tl.arange(0, DD)[None, :]
    if REVERSE:
        return part // blocks, tile, order, part, start + steps, T - 1 - start, -steps, d
    else:
        return part // blocks, tile, order, part, start + steps, start, steps, d


@triton.jit
def at(x, b, s, r, d):
    """Where an operand has row b, positions s + r, channels d: 64 bits for the tile, 32 inside it."""
    return x[0] + (b.to(tl.int64) * x[1] + s.to(tl.int64) * x[2]) + (r * x[2] + d)


@triton.jit
def read(x, b, s, r, d, mask, W: tl.constexpr):
    """A tile of an operand in the precision of the arithmetic; 0 outside."""
    return tl.load(at(x, b, s, r, d), mask=mask, other=0.0).to(W)


@triton.jit
def write(x, b, s, r, d, value, mask):
    """The opposite of `read`."""
    tl.store(at(x, b, s, r, d), value.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def documents(mark, b, t, p, T, first: tl.constexpr):
    """Of steps (TT, 1) the document that begins (first) or ends there, -1 for none; without documents the row."""
    if mark is None:
        here = t == 0 if first else t == T - 1
        return tl.where(here, b, -1)
    else:
        return tl.load(mark + p, mask=t < T, other=-1)


@triton.jit
def state_at(x, n, d, D, W: tl.constexpr):
    """States (N, D) of documents n (TT, 1); 0 where n is -1."""
    return tl.load(x + n.to(tl.int64) * D + d, mask=(n >= 0) & (d < D), other=0.0).to(W)


@triton.jit
def store_state(x, n, d, D, value):
    """The opposite of `state_at`."""
    tl.store(x + n.to(tl.int64) * D + d, value.to(x.dtype.element_ty), mask=(n >= 0) & (d < D))


@triton.jit
def cleared(a, a_im, resets, b, t, p, T):
    """Gates, 0 where the state is cleared, and which these are (TT, 1)."""
    if resets is None:
        return a, a_im, t < 0
    else:
        reset = tl.load(resets + b.to(tl.int64) * T + p, mask=t < T, other=0) != 0
        return tl.where(reset, 0.0, a), tl.where(reset, 0.0, a_im), reset


@triton.jit
def _wait(flag):
    # A look at the flag that other programs' writes before they set it are seen after.
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
        pass


@triton.jit
def _publish(flag):
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release", scope="gpu")


@triton.jit
def _peek(x, mask):
    # Past the first-level cache, which is not kept coherent between programs.
    return tl.load(x, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def carried(chain, flags, product, product_im, end, end_im, order, part, T, D, d,
            COMPLEX: tl.constexpr, MANY: tl.constexpr, TT: tl.constexpr):  # fmt: skip
    """The state (DD,) that a tile is given by those before it in the order of work; 0 for the first.

    product, end: of the tile alone, (DD,). chain: (parts, tiles, SLOTS, DD); flags: (parts, tiles, 2), zero at first.
    MANY: there is more than one tile.
    """
    DD: tl.constexpr = end.shape[0]
    state = tl.zeros_like(end)
    state_im = tl.zeros_like(end)
    if MANY:
        tiles = tl.cdiv(T, TT)
        mask = tl.reshape(d, (DD,)) < D
        flags += part.to(tl.int64) * tiles * 2
        published = chain + part.to(tl.int64) * tiles * SLOTS * DD + tl.arange(0, DD)
        own = published + order * SLOTS * DD
        tl.store(own, product, mask=mask)
        tl.store(own + DD, end, mask=mask)
        if COMPLEX:
            tl.store(own + 2 * DD, product_im, mask=mask)
            tl.store(own + 3 * DD, end_im, mask=mask)
        _publish(flags + order * 2)
        first = order // GROUP * GROUP
        # All that the group knows first: from group to group there is then one wait, not one for each tile.
        whole, whole_im = tl.full((DD,), 1.0, end.dtype), tl.zeros_like(end)
        for n in range(first, order):
            _wait(flags + n * 2)
            theirs = published + n * SLOTS * DD
            a, x = _peek(theirs, mask), _peek(theirs + DD, mask)
            if COMPLEX:
                a_im, x_im = _peek(theirs + 2 * DD, mask), _peek(theirs + 3 * DD, mask)
                whole, whole_im, state, state_im = _complex(whole, whole_im, state, state_im, a, a_im, x, x_im)
            else:
                whole, state = _real(whole, state, a, x)
        if first > 0:
            _wait(flags + first * 2 + 1)
            before = _peek(published + (first * SLOTS + 4) * DD, mask)
            if COMPLEX:
                before_im = _peek(published + (first * SLOTS + 5) * DD, mask)
                more, more_im = times(whole, whole_im, before, before_im, COMPLEX)
                state, state_im = state + more, state_im + more_im
            else:
                state += whole * before
        if (order % GROUP == GROUP - 1) & (order + 1 < tiles):
            ours, ours_im = times(product, product_im, state, state_im, COMPLEX)
            tl.store(own + (SLOTS + 4) * DD, ours + end, mask=mask)
            if COMPLEX:
                tl.store(own + (SLOTS + 5) * DD, ours_im + end_im, mask=mask)
            _publish(flags + (order + 1) * 2 + 1)
    return state, state_im


@triton.jit(do_not_specialize=["T", "rows"])
def scan_forward(
    gates, gates_im, inputs, inputs_im, states, states_im, initial, initial_im, resets, begins, chain, flags,
    T, D, rows, W: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, MANY: tl.constexpr, TT: tl.constexpr,
    DD: tl.constexpr,
):  # fmt: skip
    """All states. Imaginary parts, `initial` and marks may be None."""
    b, _, order, part, t, s, r, d = place(T, D, rows, REVERSE, False, TT, DD)
    mask = (t < T) & (d < D)
    a, x = read(gates, b, s, r, d, mask, W), read(inputs, b, s, r, d, mask, W)
    a_im, x_im = tl.zeros_like(a), tl.zeros_like(x)
    if gates_im[0] is not None:
        a_im = read(gates_im, b, s, r, d, mask, W)
    if inputs_im[0] is not None:
        x_im = read(inputs_im, b, s, r, d, mask, W)
    a, a_im, _ = cleared(a, a_im, resets, b, t, s + r, T)
    a, a_im, x, x_im = begun(a, a_im, x, x_im, initial, initial_im, begins, b, t, s + r, d, T, D, W, COMPLEX)
    product, product_im, h, h_im = tile_scan(a, a_im, x, x_im, COMPLEX, False)
    last: tl.constexpr = TT - 1
    before, before_im = carried(
        chain, flags, row(product, last, TT), row(product_im, last, TT), row(h, last, TT), row(h_im, last, TT),
        order, part, T, D, d, COMPLEX, MANY, TT,
    )  # fmt: skip
    more, more_im = times(product, product_im, before[None, :], before_im[None, :], COMPLEX)
    write(states, b, s, r, d, h + more, mask)
    if COMPLEX:
        write(states_im, b, s, r, d, h_im + more_im, mask)


@triton.jit
def begun(a, a_im, x, x_im, initial, initial_im, begins, b, t, p, d, T, D, W: tl.constexpr, COMPLEX: tl.constexpr):
    """Gates and inputs with the initial states brought in where rows or documents begin: a → 0, x → x + a·h0."""
    if initial is not None or begins is not None:
        n = documents(begins, b, t, p, T, True)
        if initial is not None:
            h = state_at(initial, n, d, D, W)
            h_im = state_at(initial_im, n, d, D, W) if initial_im is not None else tl.zeros_like(h)
            more, more_im = times(a, a_im, h, h_im, COMPLEX)
            x, x_im = x + more, x_im + more_im
        a, a_im = tl.where(n >= 0, 0.0, a), tl.where(n >= 0, 0.0, a_im)
    return a, a_im, x, x_im


@triton.jit
def adjoint(g, g_im, a, a_im, begins, order, part, t, T, d, D, chain, flags,
            COMPLEX: tl.constexpr, MANY: tl.constexpr, TT: tl.constexpr, DD: tl.constexpr):  # fmt: skip
    """Gradients of all states, G[t] = g[t] + conj(a[t+1]) G[t+1], from what each step alone adds, g.

    `begins`: where rows or documents begin, past which nothing is handed on.
    """
    c, c_im = tl.where(begins, 0.0, a), tl.where(begins, 0.0, -a_im)
    x, x_im = times(c, c_im, g, g_im, COMPLEX)
    product, product_im, back, back_im = tile_scan(c, c_im, x, x_im, COMPLEX, True)
    after, after_im = carried(
        chain, flags, row(product, 0, TT), row(product_im, 0, TT), row(back, 0, TT), row(back_im, 0, TT),
        order, part, T, D, d, COMPLEX, MANY, TT,
    )  # fmt: skip
    more, more_im = times(product, product_im, after[None, :], after_im[None, :], COMPLEX)
    G = g + neighbour(back + more, after, 1, TT, DD)
    if COMPLEX:
        return G, g_im + neighbour(back_im + more_im, after_im, 1, TT, DD)
    else:
        return G, G


@triton.jit(do_not_specialize=["T", "rows"])
def scan_backward(
    grad, grad_im, gates, gates_im, states, states_im, initial, initial_im, d_gates, d_gates_im, d_inputs, d_inputs_im,
    d_initial, d_initial_im, resets, begins, chain, flags,
    T, D, rows, W: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, MANY: tl.constexpr, TT: tl.constexpr,
    DD: tl.constexpr,
):  # fmt: skip
    """Gradients of gates, inputs and initial states."""
    b, _, order, part, t, s, r, d = place(T, D, rows, REVERSE, True, TT, DD)
    mask = (t < T) & (d < D)
    a, g = read(gates, b, s, r, d, mask, W), read(grad, b, s, r, d, mask, W)
    a_im, g_im = tl.zeros_like(a), tl.zeros_like(g)
    if gates_im[0] is not None:
        a_im = read(gates_im, b, s, r, d, mask, W)
    if COMPLEX:
        g_im = read(grad_im, b, s, r, d, mask, W)
    a, a_im, reset = cleared(a, a_im, resets, b, t, s + r, T)
    n = documents(begins, b, t, s + r, T, True)
    G, G_im = adjoint(g, g_im, a, a_im, n >= 0, order, part, t, T, d, D, chain, flags, COMPLEX, MANY, TT, DD)
    write(d_inputs, b, s, r, d, G, mask)
    if d_inputs_im[0] is not None:
        write(d_inputs_im, b, s, r, d, G_im, mask)
    earlier = r + 1 if REVERSE else r - 1
    h = tl.where(n >= 0, 0.0, read(states, b, s, earlier, d, mask & (t > 0), W))
    h_im = tl.zeros_like(h)
    if COMPLEX:
        h_im = tl.where(n >= 0, 0.0, read(states_im, b, s, earlier, d, mask & (t > 0), W))
    if initial is not None:
        h += state_at(initial, n, d, D, W)
        if initial_im is not None:
            h_im += state_at(initial_im, n, d, D, W)
    da, da_im = times(G, G_im, h, -h_im, COMPLEX)
    write(d_gates, b, s, r, d, tl.where(reset, 0.0, da), mask)
    if d_gates_im[0] is not None:
        write(d_gates_im, b, s, r, d, tl.where(reset, 0.0, da_im), mask)
    if d_initial is not None:
        back, back_im = times(a, -a_im, G, G_im, COMPLEX)
        store_state(d_initial, n, d, D, back)
        if COMPLEX:
            store_state(d_initial_im, n, d, D, back_im)
