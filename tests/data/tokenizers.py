"""Real tokenizers of three kinds, trained on the spot."""

from functools import cache

from kdbench import models
from kdbench.data import world
from kdbench.data.text import full_prompt
from kdbench.settings import TrainedTokenizer


def _texts(split: str, rows: int):
    for record in world.records(split, rows):
        yield full_prompt(record, "short")
        yield from record.outputs


@cache
def byte_level(size: int = 700):
    """As the embedded experiment trains them."""
    tokenizer = models.train_tokenizer(
        _texts("corpus", 1500), TrainedTokenizer(train_on="corpus", vocabulary_size=size)
    )
    return tokenizer


@cache
def sentencepiece(size: int = 900):
    """As Llama's and Mistral's: a space before the text, ▁ for spaces, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (word for text in _texts("corpus", 1500) for word in text.split())
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    # the trainer registers byte tokens as special ones; as ordinary entries of the model they are what byte fallback writes
    return PreTrainedTokenizerFast(
        tokenizer_object=_without_added_bytes(tokenizer), eos_token="</s>", unk_token="<unk>"
    )


def _without_added_bytes(tokenizer):
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


@cache
def characters():
    """One token a character, of a kind whose tokens' names do not tell their bytes."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)] + list("\néüñ😀日本語")
    vocabulary = {letter: index for index, letter in enumerate(["<unk>", "<end>", *letters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


REAL = ("tokenizers/gpt2", "tokenizers/qwen1.5-1.8b", "tokenizers/qwen2.5-7b-instruct", "tokenizers/llama2-7b",
        "tokenizers/tinyllama-1.1b-3t", "tokenizers/mistral-7b-v0.1", "models/stories260k", "models/aidreams260k")  # fmt: skip

HARD = (
    "Việt Nam có nhiều ngôn ngữ; tiếng Việt viết bằng chữ Latinh.",
    "👨‍👩‍👧‍👦 family, 👍🏽 thumb, 🇻🇳🇩🇪 flags, ☀️ sun",
    "two\n\nlines\n\tand a tab   three spaces",
    "a</s>b<|endoftext|>c<|end|><s><unk><|im_end|>",
    "日本語とEnglishが混ざる文。 naïve café",
    "12345 + 67890 = 80235",
    "def f(x):\n    return {'a': [1, 2, 3]}",
)
