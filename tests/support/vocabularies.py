"""Small tokenizers of all kinds, trained on sentences in several languages."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ENGLISH = [
    "The river runs slowly past the old houses, and nobody in the town remembers who built the bridge.",
    "In 1987 the council rebuilt 14 houses; the others were never finished.",
    "She said: 'The bridge isn't old, it is older than the river!'  Nobody laughed.",
    "Remembering is slower than building.\tThe townspeople built slowly, and remembered slowly.",
]
GREEK = [
    "Το ποτάμι κυλάει αργά δίπλα στα παλιά σπίτια, και κανείς δεν θυμάται ποιος έχτισε τη γέφυρα.",
    "Η γέφυρα είναι παλιά, τα σπίτια είναι παλιά, το ποτάμι είναι πιο παλιό.",
]
OTHERS = [
    "Река медленно течёт мимо старых домов, и никто не помнит, кто построил мост.",
    "河水缓缓流过老房子，没有人记得是谁修建了这座桥。老房子，老桥。",
    "Der Fluss fließt langsam an den alten Häusern vorbei; niemand weiß, wer die Brücke gebaut hat.",
    "def bridge(river):\n    return [house for house in river.houses if house.old]",
]
SENTENCES = [*ENGLISH, *GREEK, *OTHERS]
SPECIAL = ["<unk>", "<s>", "</s>"]
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_level(size: int = 520) -> PreTrainedTokenizerBase:
    """BPE on bytes, as GPT-2, Llama 3 and Qwen have it, with a token that is not in the list of merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens(["<|image|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _CHAT
    return fast


def byte_fallback(size: int = 620) -> PreTrainedTokenizerBase:
    """BPE on characters, with bytes for those that are unknown, as Llama 2 and Gemma have it."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learned.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece(size: int = 420) -> PreTrainedTokenizerBase:
    """WordPiece, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=_BERT)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _BERT, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def unigram(size: int = 300) -> PreTrainedTokenizerBase:
    """Unigram, as T5 and XLM-R have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    frame = [("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word_piece": word_piece,
    "unigram": unigram,
}


@cache
def trained(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a kind, trained once; not to be changed."""
    return KINDS[kind]()


BYTES = ("byte_level", "byte_fallback")
"""Those that write any text."""
