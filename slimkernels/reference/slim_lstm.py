"""``slim_lstm`` (one layer, one or two directions) in plain PyTorch: the specification and the fallback."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.reference import _recurrent as recurrent


def slim_lstm(
    x: Tensor,  # (steps, batch, i), or (rows, i) with batch_sizes
    h0: Tensor | None,  # (D, batch, p); None means zeros
    c0: Tensor | None,  # (D, batch, h)
    weights: Sequence[Tensor],  # of each direction: w_ih, w_hh, [b_ih, b_hh], [w_hr]
    batch_sizes: Tensor | None,  # (steps,)
    bidirectional: bool,
    hidden_size: int,  # h
    proj_size: int,  # p, or 0: no projection and p = h
    in_blocks: int,
    save: bool,  # keep what backward needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (*, D * p), final states (D, batch, p) and (D, batch, h), gates (D, *, 4, h) and cells (D, *, h).

    The gates i, f, g, o are kept after their activations; gates and cells are empty unless ``save``.
    """
    state = proj_size or hidden_size
    sizes = recurrent.step_sizes(x, batch_sizes)
    rows = x.reshape(-1, x.shape[-1]).to(recurrent.compute_dtype(x))
    found = recurrent.directions(weights, bidirectional, 4, x.shape[-1], in_blocks, hidden_size, state)
    outputs, hs, cs, all_gates, all_cells = [], [], [], [], []
    for d, w in enumerate(found):
        h, c = recurrent.initial(h0, d, x, state), recurrent.initial(c0, d, x, hidden_size)
        from_input = F.linear(rows, w.w_ih, w.b_ih)
        steps = [h] * len(sizes)
        gates, cells = [h] * len(sizes), [h] * len(sizes)
        for t, n, at in recurrent.walk(sizes, reverse=d == 1):
            z = from_input[at] + F.linear(h[:n], w.w_hh, w.b_hh)
            i, f, g, o = z.chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            new_c = f * c[:n] + i * g
            new_h = o * new_c.tanh()
            steps[t] = (new_h if w.w_hr is None else F.linear(new_h, w.w_hr)).to(x.dtype).to(new_h.dtype)
            h, c = recurrent.advance(h, steps[t], n), recurrent.advance(c, new_c, n)
            gates[t], cells[t] = torch.stack([i, f, g, o], 1), new_c
        outputs.append(torch.cat(steps))
        hs.append(h)
        cs.append(c)
        all_gates.append(torch.cat(gates))
        all_cells.append(torch.cat(cells))
    lead = x.shape[:-1]
    y = torch.cat(outputs, 1).view(*lead, len(found) * state).to(x.dtype)
    h_n, c_n = torch.stack(hs).to(x.dtype), torch.stack(cs).to(x.dtype)
    if not save:
        return y, h_n, c_n, x.new_empty(0), x.new_empty(0)
    kept_gates, kept_cells = torch.stack(all_gates).to(x.dtype), torch.stack(all_cells).to(x.dtype)
    shape = (len(found), *lead)
    return y, h_n, c_n, kept_gates.view(*shape, 4, hidden_size), kept_cells.view(*shape, hidden_size)


def slim_lstm_backward(
    dy: Tensor | None,  # (*, D * p); None means zeros, so for the next two
    dh_n: Tensor | None,  # (D, batch, p)
    dc_n: Tensor | None,  # (D, batch, h)
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    bidirectional: bool,
    hidden_size: int,
    proj_size: int,
    in_blocks: int,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of x, of h0 and c0 and of every weight (full size); an empty tensor where not needed."""
    state = proj_size or hidden_size
    sizes = recurrent.step_sizes(x, batch_sizes)
    rows = x.reshape(-1, x.shape[-1]).to(recurrent.compute_dtype(x))
    y = y.reshape(rows.shape[0], -1).to(rows.dtype)
    dy = torch.zeros_like(y) if dy is None else dy.reshape(y.shape).to(rows.dtype)
    found = recurrent.directions(weights, bidirectional, 4, x.shape[-1], in_blocks, hidden_size, state)
    empty = x.new_empty(0)
    dx = torch.zeros_like(rows)
    dhs, dcs, parts = [], [], []
    for d, w in enumerate(found):
        at_output = slice(d * state, (d + 1) * state)
        gates_d = gates[d].reshape(-1, 4, hidden_size).to(rows.dtype)
        cells_d = cells[d].reshape(-1, hidden_size).to(rows.dtype)
        h, c = recurrent.initial(h0, d, x, state), recurrent.initial(c0, d, x, hidden_size)
        visits, h_prev, c_prev = list(recurrent.walk(sizes, reverse=d == 1)), [h] * len(sizes), [h] * len(sizes)
        for t, n, at in visits:
            h_prev[t], c_prev[t] = h[:n], c[:n]
            h, c = recurrent.advance(h, y[at, at_output], n), recurrent.advance(c, cells_d[at], n)
        dh = torch.zeros_like(h) if dh_n is None else dh_n[d].to(rows.dtype)
        dc = torch.zeros_like(c) if dc_n is None else dc_n[d].to(rows.dtype)
        dz = [h] * len(sizes)
        dw_hr = None if w.w_hr is None else torch.zeros_like(w.w_hr)
        for t, n, at in reversed(visits):
            i, f, g, o = gates_d[at].unbind(1)
            tanh_c = cells_d[at].tanh()
            dh_t = dh[:n] + dy[at, at_output]
            if w.w_hr is not None and dw_hr is not None:
                dw_hr = dw_hr + dh_t.t().mm(o * tanh_c)
                dh_t = dh_t.mm(w.w_hr)
            dc_t = dc[:n] + dh_t * o * (1 - tanh_c * tanh_c)
            di, df, dg, do = dc_t * g, dc_t * c_prev[t], dc_t * i, dh_t * tanh_c
            dz[t] = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], 1)
            dh, dc = recurrent.advance(dh, dz[t].mm(w.w_hh), n), recurrent.advance(dc, dc_t * f, n)
        dz_all = torch.cat(dz)
        dx = dx + dz_all.mm(w.w_ih)
        dhs.append(dh)
        dcs.append(dc)
        parts.append((dz_all, dz_all, rows, torch.cat(h_prev), dw_hr))
    dw = recurrent.weight_gradients(weights, bidirectional, 4, in_blocks, parts) if need_dw else []
    return (
        dx.view(x.shape).to(x.dtype) if need_dx else empty,
        torch.stack(dhs).to(x.dtype) if need_dstate else x.new_empty(0),
        torch.stack(dcs).to(x.dtype) if need_dstate else x.new_empty(0),
        dw,
    )
