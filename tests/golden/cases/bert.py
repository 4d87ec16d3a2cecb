"""Encoders of BERT's kind.  Row i of what is kept is the mean over the text of ids[: i + 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from case import (
    N_VOCAB,
    Case,
    Steps,
    gelu_tanh,
    identity,
    no_rope,
    parameters,
    patch,
    rms_norm,
    rope_on_pairs,
    swapped,
    values,
)
from transformers.models.bert import modeling_bert
from transformers.models.modernbert import modeling_modernbert
from transformers.models.nomic_bert import modeling_nomic_bert
from transformers.models.xlm_roberta import modeling_xlm_roberta


def means(model: Any, ids: np.ndarray) -> np.ndarray:
    """float64 [n, n_embd] of ids [n]"""
    text = torch.from_numpy(ids)[None].long()
    with torch.no_grad():
        states = [model(text[:, : i + 1]).last_hidden_state[0] for i in range(len(ids))]
    return torch.stack([state.mean(0) for state in states]).numpy()


def causal(module: Any) -> Any:
    """Attention's scores of later tokens are lost."""
    forward = module.eager_attention_forward

    def masked(layer: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        n = q.shape[-2]
        later = torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)[None, None]
        return forward(layer, q, k, v, later if mask is None else mask + later, **options)

    return patch(module, "eager_attention_forward", masked)


def common(model: Any) -> Steps:
    return {
        "no kinds of texts": parameters(model, "token_type_embeddings", 0),
        "no norm of embeddings": swapped([model.embeddings], "LayerNorm", identity),
        "rms norm": patch(torch.nn.LayerNorm, "forward", rms_norm),
    }


def bert(model: Any) -> Steps:
    sums = [layer.attention.output for layer in model.encoder.layer]
    feeds = [layer.intermediate for layer in model.encoder.layer]
    return common(model) | {
        "causal": causal(modeling_bert),
        "no norm after attention": swapped(sums, "LayerNorm", identity),
        "no positions": parameters(model, "position_embeddings", 0),
        "the other gelu": swapped(feeds, "intermediate_act_fn", gelu_tanh),
        "no biases": parameters(model, ".bias", 0),
    }


def roberta(model: Any) -> Steps:
    table = model.embeddings.position_embeddings
    first = torch.nn.Parameter(table.weight.roll(2, 0))
    return bert(model) | {
        "causal": causal(modeling_xlm_roberta),
        "positions from the first": values((table, "weight", first)),
    }


def nomic(model: Any) -> Steps:
    module, feeds = modeling_nomic_bert, [layer.mlp for layer in model.layers]
    inverse = model.rotary_emb.inv_freq
    return common(model) | {
        "causal": causal(module),
        "no norm after attention": swapped(model.layers, "post_attention_layernorm", identity),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "the usual base": values((model.rotary_emb, "inv_freq", inverse ** (4 / 3))),
        "gelu in place of silu": swapped(feeds, "act_fn", torch.nn.functional.gelu),
        "gate and up exchanged": values(
            *((feed, "gate_proj", feed.up_proj) for feed in feeds),
            *((feed, "up_proj", feed.gate_proj) for feed in feeds),
        ),
    }


def modern(model: Any) -> Steps:
    module, layers, rope = modeling_modernbert, model.layers, model.rotary_emb
    feeds, width = [layer.mlp for layer in layers], model.config.local_attention
    full_mask = module.create_bidirectional_mask

    def kinds(*windowed: int) -> Any:
        """Only these layers have a window and its rope."""
        return values(
            *(
                (layer, "attention_type", f"{'sliding' if i in windowed else 'full'}_attention")
                for i, layer in enumerate(layers)
            )
        )

    def exchanged(weight: Any) -> Any:
        return torch.nn.Parameter(weight.roll(len(weight) // 2, 0))

    plain = torch.nn.functional.layer_norm
    return {
        "causal": causal(module),
        "no norm of embeddings": swapped([model.embeddings], "norm", identity),
        "first layer normed": swapped([layers[0]], "attn_norm", lambda x: plain(x, x.shape[-1:])),
        "rms norm": patch(torch.nn.LayerNorm, "forward", rms_norm),
        "no rope": patch(module, "apply_rotary_pos_emb", no_rope),
        "rope on pairs": patch(module, "apply_rotary_pos_emb", rope_on_pairs),
        "one rope for all layers": values(
            (rope, "sliding_attention_inv_freq", rope.full_attention_inv_freq)
        ),
        "the other gelu": swapped(feeds, "act", gelu_tanh),
        "gate and up exchanged": values(*((f.Wi, "weight", exchanged(f.Wi.weight)) for f in feeds)),
        "no window": patch(module, "create_bidirectional_sliding_window_mask", full_mask),
        "window twice as wide": values((model.config, "local_attention", 2 * width)),
        "windows everywhere": kinds(0, 1, 2, 3),
        "windows of the other layers": kinds(0, 1, 3),
    }


SMALL: dict[str, Any] = dict(
    vocab_size=N_VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=512, pad_token_id=3,
)  # fmt: skip
EMBEDDINGS = r"embeddings\.(?:word|position|token_type)_embeddings\.weight"

BERT = {
    EMBEDDINGS: (0.0, 0.35),
    # Where gelu is small its two forms differ by percents, which the next matrix enlarges.
    r".*\.intermediate\.dense\.weight": (0.0, 0.08),
    r".*\.intermediate\.dense\.bias": (-3.0, 0.3),
    r".*\.layer\.\d+\.output\.dense\.weight": (0.0, 16.0),
    r".*\.(?:query|key)\.weight": (0.0, 0.25),
}

CASES = [
    Case(
        "bert",
        "bert",
        transformers.BertConfig(**SMALL),
        transformers.BertModel,
        bert,
        scales=BERT,
        kind="encoder",
        answer=means,
    ),
    Case(
        "bert-roberta",
        "bert",
        # Two positions more than it uses, and one kind of texts.
        transformers.XLMRobertaConfig(
            **SMALL | {"max_position_embeddings": 514, "pad_token_id": 1}, type_vocab_size=1
        ),
        transformers.XLMRobertaModel,
        roberta,
        subtle=("the other gelu",),
        scales=BERT,
        kind="encoder",
        answer=means,
    ),
    Case(
        "nomic-bert",
        "nomic-bert",
        transformers.NomicBertConfig(**SMALL),
        transformers.NomicBertModel,
        nomic,
        scales={
            EMBEDDINGS: (0.0, 0.35),
            r".*\.norm\d\.weight|emb_ln\.weight": (1.0, 0.25),
            r".*\.attn\.Wqkv\.weight": (0.0, 0.25),
            r".*\.mlp\.fc\d+\.weight": (0.0, 0.25),
        },
        kind="encoder",
        answer=means,
    ),
    Case(
        "modern-bert",
        "modern-bert",
        transformers.ModernBertConfig(
            **SMALL | {"num_hidden_layers": 4},
            local_attention=48,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        transformers.ModernBertModel,
        modern,
        subtle=("the other gelu",),
        scales={
            r"embeddings\.tok_embeddings\.weight": (0.0, 0.35),
            r".*\.attn\.Wqkv\.weight": (0.0, 0.45),
            r".*\.mlp\.Wi\.weight": (0.0, 0.15),
            r".*\.mlp\.Wo\.weight": (0.0, 1.5),
        },
        kind="encoder",
        answer=means,
    ),
]
