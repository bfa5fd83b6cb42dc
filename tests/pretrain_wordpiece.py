"""Runs one of upstream's scripts with masked word pieces (BERT, T5), named first, with a vocabulary made up here.

Upstream's own word-piece tokenizers want the package transformers and a file of words.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from megatron.core.models.bert import bert_layer_specs
from megatron.core.tokenizers import MegatronTokenizer

WORDS = 300
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")


class WordPieces:
    """Token ids: the special ones, sentinels of T5, then words; every fourth goes on with the word before it."""

    def __init__(self) -> None:
        sentinels = [f"<extra_id_{i}>" for i in range(20)]
        words = [f"##{i}" if i % 4 == 3 else f"w{i}" for i in range(WORDS)]
        self.vocab = {word: i for i, word in enumerate([*SPECIAL, *sentinels, *words])}
        self.inv_vocab = {i: word for word, i in self.vocab.items()}
        self.pad, self.cls, self.sep, self.mask, self.bos, self.eos = range(len(SPECIAL))
        self.eod, self.unique_identifiers = self.eos, {"class": "WordPieces"}
        self.additional_special_tokens_ids = [self.vocab[word] for word in sentinels]
        self.vocab_size = len(self.vocab)


def _tokenizer(*args: Any, **kwargs: Any) -> WordPieces:
    return WordPieces()


if __name__ == "__main__":
    MegatronTokenizer.from_pretrained = _tokenizer
    bert_layer_specs.bert_layer_with_transformer_engine_spec = None  # imported, never used: `--spec local`
    script = sys.argv.pop(1)
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
