"""NSNet2 and BSRNN: published sizes, streaming, the packing of spectra."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from slimkernels.models.bsrnn import BSRNN, V7_BANDS, pack, unpack
from slimkernels.models.nsnet2 import NSNet2, log_power


def test_v7_split_covers_every_bin():
    assert (len(V7_BANDS), sum(V7_BANDS)) == (41, 1025)


def test_bsrnn_has_the_published_size():
    with torch.device("meta"):
        model = BSRNN()
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    assert round(weights / 1e6, 1) == 27.3


def test_bsrnn_has_the_published_macs_per_three_seconds():
    with torch.device("meta"):
        model, x = BSRNN(), torch.empty(1, 259, 4100)
        lstm = sum(p.numel() for name, p in model.named_parameters() if ".rnn.weight" in name) * 41 * 259
        for block in model.modules():
            if isinstance(block, torch.nn.LSTM):
                block.forward = lambda h, size=2 * block.hidden_size: (h.new_empty(*h.shape[:-1], size), None)
        with FlopCounterMode(display=False) as counter:
            assert model(x).shape == x.shape
    assert round((lstm + counter.get_total_flops() / 2) / 1e9) == 219


def test_bsrnn_separates_into_the_mixture_s_shape_and_a_mask_of_one_is_the_identity():
    model = BSRNN(8, 8, 1, bands=[5, 12], channels=1)
    mixture, window = torch.randn(2, 1, 160), torch.hann_window(32)
    assert model.separate(mixture, window, 16).shape == mixture.shape
    model.forward = lambda packed: pack(torch.ones_like(unpack(packed, 1)))
    assert torch.allclose(model.separate(mixture, window, 16), mixture, atol=1e-5)


def test_pack_keeps_a_band_together():
    spectrum = torch.randn(1, 2, 6, 3, dtype=torch.complex64)
    assert torch.equal(unpack(pack(spectrum), 2), spectrum)
    assert torch.equal(pack(spectrum)[..., : 2 * 4], pack(spectrum[:, :, :2]))


def test_nsnet2_streaming_equals_the_whole_signal():
    model, x = NSNet2(24, 32).eval(), torch.randn(2, 7, 161)
    with torch.no_grad():
        whole, state, parts = model(x), None, []
        for frame in x.split(1, 1):
            gain, state = model.stream(frame, state)
            parts.append(gain)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
    assert sum(p.numel() for p in NSNet2().parameters()) == 2_687_561


def test_log_power_is_floored():
    assert torch.equal(log_power(torch.tensor([0j, 10 + 0j])), torch.tensor([-12.0, 2.0]))
