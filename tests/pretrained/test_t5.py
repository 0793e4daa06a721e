"""T5's encoder beside transformers'."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rgdiff.pretrained import t5
from rgdiff.pretrained.config import Config
from tests.pretrained import parity

TINY = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3}
# Few buckets and a short reach, so that 12 tokens meet every kind of distance.
TINY |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "is_encoder_decoder": False}
IDS = np.random.RandomState(0).randint(0, 40, (2, 12))


def torch_t5(config):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config, use_cache=False))


def call(module, inputs):
    return module(**inputs).last_hidden_state


CASES = [
    parity.Case(
        name="t5",
        config={**TINY, "feed_forward_proj": "gated-gelu"},
        network=t5.T5EncoderModel,
        inputs={"input_ids": IDS},
        build=torch_t5,
        call=call,
        wrt=None,
        rename=t5.rename,
        tolerance=(1.0, 1.0, 2.0),  # transformers computes the mean square in float32 even in float64
    ),
    parity.Case(
        name="t5_relu_mask",  # version 1.0, with padding
        config=TINY,
        network=t5.T5EncoderModel,
        inputs={"input_ids": IDS, "attention_mask": np.arange(12)[None] < np.array([[12], [7]])},
        build=torch_t5,
        call=call,
        wrt=None,
        rename=t5.rename,
        tolerance=(1.0, 1.0, 2.0),  # transformers computes the mean square in float32 even in float64
    ),
]
FULL = [
    parity.Full(
        "t5-xxl-encoder",
        {
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
        },  # fmt: skip
        t5.T5EncoderModel,
        {"input_ids": parity.spec(1, 512, dtype=jnp.int32)},
        torch_t5,
        t5.rename,
    )
]


test_golden, test_torch, test_keys, test_bfloat16, test_remat = parity.table(CASES, FULL, recomputed=CASES[:1])


@pytest.mark.slow
def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="compares with transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    for count, furthest in ((32, 128), (8, 10), (64, 500)):
        wanted = T5Attention._relative_position_bucket(offset, True, count, furthest).numpy()
        np.testing.assert_array_equal(t5.buckets(600, count, furthest), wanted)


def test_buckets():
    table = t5.buckets(300, 32, 128)
    assert list(table[0, [0, 1, 7, 8, 127, 128, 299]]) == [0, 17, 23, 24, 31, 31, 31]
    assert list(table[[0, 1, 7, 8, 127, 128, 299], 0]) == [0, 1, 7, 8, 15, 15, 15]


def test_bad_input_is_refused():
    for change, message in (
        ({"feed_forward_proj": "gated-tanh"}, "does not support feed_forward_proj = 'gated-tanh', only 'relu'"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "does not support is_gated_act = True, only False"),
        ({"is_decoder": True}, "does not support is_decoder = True, only False"),
    ):
        with pytest.raises(ValueError, match=message):
            t5.T5EncoderModel(Config(TINY | change))
