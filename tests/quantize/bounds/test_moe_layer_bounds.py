"""One layer with experts alone, on a token for which each part of the bound of its output is nearly reached.

The residual stream is a unit vector of two elements, turned by a small ANGLE: the normed state is sqrt(2) times it and
moves by sqrt(2) ANGLE. Quantized experts are as they were, so that nothing but the stream moves.
"""

import numpy as np
import pytest

from hetmoe.models.params import FeedForward, Layer, MoE
from hetmoe.quantize.bounds.moe_layer import after_experts
from hetmoe.quantize.bounds.streams import Streams
from tests.models.tiny import tiny_config

ANGLE = 1e-3
STEEP = 50.0  # silu(z) = z for arguments of this size: its sigmoid is 1 but for e^-70
OUT = 2 * STEEP  # of a network below with weights of STEEP and 1: sqrt(2) times sqrt(2) times these


def at(angle):
    """A stream of one token."""
    return np.array([[[np.cos(angle), np.sin(angle)]]])


def networks(up, down):
    """Networks of one neuron, `[..., 2, 1]` and `[..., 1, 2]`, whose gates read the first element, steeply."""
    up, down = np.array(up, float)[..., :, None], np.array(down, float)[..., None, :]
    gate = np.zeros_like(up)
    gate[..., 0, 0] = STEEP
    return FeedForward(gate=gate, up=up, down=down)


def reach(clean, moved, router, experts, shared=None, **changes):
    """(change of the stream behind the layer, its bounds from both starts, the certificate)."""
    config = tiny_config(
        hidden_size=2, expert_intermediate_size=1, num_experts=router.shape[1], norm_topk_prob=True,
        rms_norm_eps=1e-12, shared_intermediate_size=None if shared is None else 1, **changes,
    )  # fmt: skip
    moe = MoE(router=router, experts=None, shared=shared)
    layer = Layer(input_norm=None, attention=None, ffn_norm=np.ones(2), moe=moe)
    radius = np.linalg.norm(moved - clean, axis=-1) * (1 + 1e-12)  # the subtraction rounds
    before = Streams(clean, {"whole_model": moved}, {"whole_model": {"bound": radius, "measured": radius}})
    after, certificate = after_experts(before, layer, experts, experts, 0, config)
    change = np.linalg.norm(after.runs["whole_model"] - after.clean, axis=-1)
    return change.item(), {s: r.item() for s, r in after.radii["whole_model"].items()}, certificate.whole_model


def test_turned_weights_reach_the_bound():
    """Two experts of opposite outputs, both of them always chosen: turning their weights changes twice the output.

    The weights become 0.8 and 0.2, a change of 0.6 OUT. For that of the outputs, which is of second order here, the
    bound adds 2 ANGLE of each (it holds a product), with weights of up to 0.8 each: 3.2 ANGLE OUT, 0.5 % of the change.
    """
    logit = 2**0.5  # of the first expert, when moved; the weights are 1/2 each at first
    router = np.array([[0.0, 0.0], [1.0 / ANGLE, 0.0]])
    experts = networks([[[1, 0], [1, 0]]], [[[1, 0], [-1, 0]]])
    change, bounds, reading = reach(at(0), at(ANGLE), router, experts, experts_per_token=2)
    assert change == pytest.approx(2 * OUT * (1 / (1 + np.exp(-logit)) - 1 / 2), rel=1e-5)
    assert reading.certified.all()
    for bound in bounds.values():
        assert change <= bound <= 1.01 * change


@pytest.mark.parametrize("copies", [1, 2])
def test_other_experts_reach_the_bound(copies):
    """All experts of the token give way to others, of outputs in the opposite direction: both sums count in full.

    The bound takes the new experts in their best direction, from which the inputs are off by ANGLE / 2 (the square of
    that is lost), and adds the change of the stream before, ANGLE, to a change of 2 OUT: 5e-6 of it.
    """
    signs = np.repeat([1.0, -1.0], copies)
    experts = networks([[[1, 0]] * 2 * copies], [[[sign, 0] for sign in signs]])
    router = np.stack([np.zeros_like(signs), signs])
    change, bounds, reading = reach(at(ANGLE / 2), at(-ANGLE / 2), router, experts, experts_per_token=copies)
    assert change == pytest.approx(2 * OUT, rel=1e-5)
    assert reading.changed.all() and not reading.certified.any()
    for bound in bounds.values():
        assert change <= bound <= (1 + 1e-5) * change


def test_a_shared_expert_reaches_the_bound():
    """Its output is OUT times the sine of the angle (and its cosine), along the stream's own change; routed ones are 0.

    The bound lets both factors of the output change: by ANGLE of the change more.
    """
    routed = FeedForward(gate=np.zeros((1, 1, 2, 1)), up=np.zeros((1, 1, 2, 1)), down=np.zeros((1, 1, 1, 2)))
    shared = networks([0, 1], [0, 1])
    change, bounds, reading = reach(at(0), at(ANGLE), np.zeros((2, 1)), routed, shared, experts_per_token=1)
    assert change == pytest.approx((1 + OUT) * ANGLE, rel=1e-5)
    assert reading.certified.all()
    for bound in bounds.values():
        assert change <= bound <= 1.002 * change
