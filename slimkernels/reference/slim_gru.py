"""``slim_gru`` (one layer, one or two directions) in plain PyTorch: the specification and the fallback."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.reference import _recurrent as recurrent


def slim_gru(
    x: Tensor,  # (steps, batch, i), or (rows, i) with batch_sizes
    h0: Tensor | None,  # (D, batch, h); None means zeros
    weights: Sequence[Tensor],  # of each direction: w_ih, w_hh, [b_ih, b_hh]
    batch_sizes: Tensor | None,  # (steps,)
    bidirectional: bool,
    hidden_size: int,  # h
    in_blocks: int,
    save: bool,  # keep what backward needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (*, D * h), final state (D, batch, h) and gates (D, *, 4, h), empty unless ``save``.

    Kept are r, z and n after their activations and the recurrent half of n before it is multiplied by r.
    """
    sizes = recurrent.step_sizes(x, batch_sizes)
    rows = x.reshape(-1, x.shape[-1]).to(recurrent.compute_dtype(x))
    found = recurrent.directions(weights, bidirectional, 3, x.shape[-1], in_blocks, hidden_size, hidden_size)
    outputs, hs, all_gates = [], [], []
    for d, w in enumerate(found):
        h = recurrent.initial(h0, d, x, hidden_size)
        from_input = F.linear(rows, w.w_ih, w.b_ih)
        steps, gates = [h] * len(sizes), [h] * len(sizes)
        for t, n, at in recurrent.walk(sizes, reverse=d == 1):
            xr, xz, xn = from_input[at].chunk(3, 1)
            hr, hz, hn = F.linear(h[:n], w.w_hh, w.b_hh).chunk(3, 1)
            r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
            new = (xn + r * hn).tanh()
            steps[t] = ((1 - z) * new + z * h[:n]).to(x.dtype).to(new.dtype)
            h = recurrent.advance(h, steps[t], n)
            gates[t] = torch.stack([r, z, new, hn], 1)
        outputs.append(torch.cat(steps))
        hs.append(h)
        all_gates.append(torch.cat(gates))
    lead = x.shape[:-1]
    y = torch.cat(outputs, 1).view(*lead, len(found) * hidden_size).to(x.dtype)
    h_n = torch.stack(hs).to(x.dtype)
    if not save:
        return y, h_n, x.new_empty(0)
    return y, h_n, torch.stack(all_gates).to(x.dtype).view(len(found), *lead, 4, hidden_size)


def slim_gru_backward(
    dy: Tensor | None,  # (*, D * h); None means zeros, so for the next
    dh_n: Tensor | None,  # (D, batch, h)
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    gates: Tensor,
    bidirectional: bool,
    hidden_size: int,
    in_blocks: int,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of x, of h0 and of every weight (full size); an empty tensor where not needed."""
    sizes = recurrent.step_sizes(x, batch_sizes)
    rows = x.reshape(-1, x.shape[-1]).to(recurrent.compute_dtype(x))
    y = y.reshape(rows.shape[0], -1).to(rows.dtype)
    dy = torch.zeros_like(y) if dy is None else dy.reshape(y.shape).to(rows.dtype)
    found = recurrent.directions(weights, bidirectional, 3, x.shape[-1], in_blocks, hidden_size, hidden_size)
    empty = x.new_empty(0)
    dx = torch.zeros_like(rows)
    dhs, parts = [], []
    for d, w in enumerate(found):
        at_output = slice(d * hidden_size, (d + 1) * hidden_size)
        gates_d = gates[d].reshape(-1, 4, hidden_size).to(rows.dtype)
        h = recurrent.initial(h0, d, x, hidden_size)
        visits, h_prev = list(recurrent.walk(sizes, reverse=d == 1)), [h] * len(sizes)
        for t, n, at in visits:
            h_prev[t] = h[:n]
            h = recurrent.advance(h, y[at, at_output], n)
        dh = torch.zeros_like(h) if dh_n is None else dh_n[d].to(rows.dtype)
        dx_gates, dh_gates = [h] * len(sizes), [h] * len(sizes)
        for t, n, at in reversed(visits):
            r, z, new, hn = gates_d[at].unbind(1)
            dh_t = dh[:n] + dy[at, at_output]
            dz = dh_t * (h_prev[t] - new) * z * (1 - z)
            dn = dh_t * (1 - z) * (1 - new * new)
            dr = dn * hn * r * (1 - r)
            dx_gates[t], dh_gates[t] = torch.cat([dr, dz, dn], 1), torch.cat([dr, dz, dn * r], 1)
            dh = recurrent.advance(dh, dh_t * z + dh_gates[t].mm(w.w_hh), n)
        dx_all = torch.cat(dx_gates)
        dx = dx + dx_all.mm(w.w_ih)
        dhs.append(dh)
        parts.append((dx_all, torch.cat(dh_gates), rows, torch.cat(h_prev), None))
    dw = recurrent.weight_gradients(weights, bidirectional, 3, in_blocks, parts) if need_dw else []
    return (
        dx.view(x.shape).to(x.dtype) if need_dx else empty,
        torch.stack(dhs).to(x.dtype) if need_dstate else x.new_empty(0),
        dw,
    )
