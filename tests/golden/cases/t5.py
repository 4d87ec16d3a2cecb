"""T5, mT5 and UMT5: an encoder beside the decoder, biases of scores by distance, of the first layer
or of each, a scaled or an untied head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from case import Case, Steps, identity, layer_norm, parameters, patch, swapped, values
from goldens import N_VOCAB, decoder_ids
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5

SMALL: dict[str, Any] = dict(
    vocab_size=N_VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=2,
    num_heads=6, n_positions=512, dropout_rate=0.0, pad_token_id=3, eos_token_id=2,
    decoder_start_token_id=3,
)  # fmt: skip

SCALES = {
    r".*\.(?:SelfAttention|EncDecAttention)\.q\.weight": (0.0, 0.06),
    r".*relative_attention_bias\.weight": (0.0, 1.2),
    r"shared\.weight": (0.0, 0.35),
}


def answer(model: Any, ids: np.ndarray) -> np.ndarray:
    """float64 [n, n_vocab] of the decoder's ids, with the encoder's."""
    source, target = (torch.from_numpy(x)[None].long() for x in (ids, decoder_ids(ids)))
    with torch.no_grad():
        out = model(input_ids=source, decoder_input_ids=target, use_cache=False)
    return out.logits[0].numpy()


def gelu_erf(x: Any) -> Any:
    return torch.nn.functional.gelu(x)


@contextmanager
def causal_encoder(module: Any) -> Iterator[None]:
    def mask(config: Any, inputs_embeds: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        if encoder_hidden_states is not None:
            return None
        n = inputs_embeds.shape[1]
        return torch.full((1, 1, n, n), -torch.inf, dtype=inputs_embeds.dtype).triu(1)

    with patch(module, "create_bidirectional_mask", mask):
        yield


def nothing_across(self: Any, hidden_states: Any, *rest: Any, **options: Any) -> Any:
    return hidden_states, None, None


def common(model: Any, module: Any, prefix: str) -> Steps:
    blocks = [*model.encoder.block, *model.decoder.block]
    own = [block.layer[0].SelfAttention for block in blocks]
    across = [block.layer[1].EncDecAttention for block in model.decoder.block]
    biased = [a for a in own if a.has_relative_attention_bias]
    feeds = [block.layer[-1].DenseReluDense for block in blocks]
    encoder = [a for a in biased if not a.is_decoder]
    decoder = [a for a in biased if a.is_decoder]

    found: Steps = {
        "no biases by distance": parameters(model, "relative_attention_bias", 0),
        "the decoder's buckets in the encoder": values(*((a, "is_decoder", True) for a in encoder)),
        "the encoder's buckets in the decoder": values(
            *((a, "is_decoder", False) for a in decoder)
        ),
        "half of the buckets": values(*((a, "relative_attention_num_buckets", 16) for a in biased)),
        "far distances alike": values(
            *((a, "relative_attention_max_distance", 64) for a in biased)
        ),
        "scaled scores": values(*((a, "scaling", 0.25) for a in own)),
        "scaled scores across": values(*((a, "scaling", 0.25) for a in across)),
        "no attention across": patch(
            getattr(module, f"{prefix}LayerCrossAttention"), "forward", nothing_across
        ),
        "an encoder that looks back": causal_encoder(module),
        "an encoder without its last norm": swapped([model.encoder], "final_layer_norm", identity),
        "silu in the feed-forward": swapped(feeds, "act", torch.nn.functional.silu),
        "layer norm": patch(getattr(module, f"{prefix}LayerNorm"), "forward", layer_norm),
    }
    if model.config.is_gated_act:
        found["the other gelu"] = swapped(feeds, "act", gelu_erf)
    return found


def t5(model: Any) -> Steps:
    scaled = model.config.scale_decoder_outputs
    return common(model, modeling_t5, "T5") | {
        "the head's scale": values((model.config, "scale_decoder_outputs", not scaled))
    }


def mt5(model: Any) -> Steps:
    head = model.lm_head
    return common(model, modeling_mt5, "MT5") | {
        "the head's scale": swapped([model], "lm_head", lambda x: head(x * 64**-0.5))
    }


def umt5(model: Any) -> Steps:
    stacks = (model.encoder.block, model.decoder.block)
    own = [[block.layer[0].SelfAttention for block in blocks] for blocks in stacks]
    across = modeling_umt5.UMT5LayerCrossAttention
    return common(model, modeling_umt5, "UMT5") | {
        "no attention across": patch(across, "forward", lambda self, x, **_: (x, None)),
        "the head's scale": values((model.config, "tie_word_embeddings", False)),
        "the first layer's biases in all": values(
            *(
                (a, "relative_attention_bias", first.relative_attention_bias)
                for first, *rest in own
                for a in rest
            )
        ),
    }


# With a head of its own, as published ones; `transformers` ties what it makes itself.
Untied = type(
    "T5ForConditionalGeneration",
    (transformers.T5ForConditionalGeneration,),
    {
        "_tied_weights_keys": {
            f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")
        }
    },
)


def case(name: str, config: Any, model: Any, steps: Callable[[Any], Steps] = t5) -> Case:
    return Case(
        name, "t5", config, model, steps, subtle=("the other gelu",),
        scales=SCALES, kind="encoder-decoder", answer=answer,
    )  # fmt: skip


CASES = [
    case("t5", transformers.T5Config(**SMALL), transformers.T5ForConditionalGeneration),
    case(
        "t5-gated",
        transformers.T5Config(
            **SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            relative_attention_num_buckets=20,
        ),
        Untied,
    ),
    *(
        case(
            f"t5-{name.lower()}",
            getattr(transformers, f"{name}Config")(**SMALL | {"num_layers": 2}),
            getattr(transformers, f"{name}ForConditionalGeneration"),
            steps,
        )
        for name, steps in (("MT5", mt5), ("UMT5", umt5))
    ),
]  # fmt: skip
