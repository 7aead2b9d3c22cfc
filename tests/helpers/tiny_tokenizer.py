"""A real byte-level BPE tokenizer, trained in milliseconds, so that tests need no network."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, START, PAD = "<s>", "<|im_end|>", "<|im_start|>", "<pad>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "Once upon a time there was a little girl who loved to play in the sun.",
    "The movie was wonderful, the actors were brilliant and the story moved everyone.",
    "The film was dull, slow and predictable; nobody laughed and several people left.",
    "Review: a warm and funny picture about friendship.\nSentiment: positive",
    "Review: an empty, noisy and tiresome sequel.\nSentiment: negative",
    "Question: what is the capital of France?\nAnswer: The capital of France is Paris.",
    "user assistant system: you are a helpful assistant, answer the question of the user.",
    "Adapters are grafted onto a frozen base model, which keeps its weights unchanged.",
    "Numbers such as 12, 345 and 6789 appear between words and punctuation (sometimes).",
    "Under the wide and starry sky, dig the grave and let me lie; glad did I live and gladly die.",
)


def tiny_tokenizer(
    directory: str | Path,
    vocab_size: int = 300,
    pad_is_eos: bool = True,
    chat_template: str | None = CHATML,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Train, save to ``directory`` (Hugging Face files) and return a tokenizer of ``vocab_size`` (at least 260) tokens.

    ``<|im_end|>`` is the end of sequence and of a chat turn, ``<s>`` the beginning; ``pad_is_eos`` makes the
    padding token the end token (the usual trap), ``adds_bos`` makes ``tokenizer(text)`` begin with ``<s>``.
    """
    special = [BOS, EOS, START, PAD]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([f"<extra_{i}>" for i in range(vocab_size - backend.get_vocab_size())])
    assert backend.get_vocab_size() == vocab_size, "260 (bytes and special tokens) is the smallest vocabulary"
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS if pad_is_eos else PAD
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(directory))
    return tokenizer
