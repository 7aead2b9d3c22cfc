"""A tokenizer of T5's kind: SentencePiece-like words with a leading space mark, pad 0, end 1, unknown 2, no BOS."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_tokenizer import CORPUS

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def t5_tokenizer(directory: str | Path, vocab_size: int = 200, closes: bool = True) -> PreTrainedTokenizerFast:
    """Train, save to ``directory`` and return it; ``closes``: it ends every text with the end token, as T5's does."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    letters = sorted({letter for text in CORPUS for letter in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK], unk_token=UNK, initial_alphabet=letters,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    if closes:
        backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, unk_token=UNK)
    tokenizer.save_pretrained(str(directory))
    return tokenizer
