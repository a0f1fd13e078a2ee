"""RWKV's tokenizer for Hugging Face's transformers: of the tokens that the text's bytes begin with the longest, again
and again. Token 0 ends a document.

The vocabulary's file has a line for each id from 1 on: the id, the token as a Python literal (a string or bytes), and
its length in bytes.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizer

VOCABULARY = "rwkv_vocab_v20230424.txt"


class RwkvTokenizer(PreTrainedTokenizer):
    """A token's name is its bytes, each written as the character of that number."""

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file, eos_token="<|endoftext|>", **options):
        self.vocab_file = vocab_file
        self._ids = dict[str, int]()
        for line in Path(vocab_file).read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            number, rest = line.split(" ", 1)
            token = ast.literal_eval(rest.rsplit(" ", 1)[0])
            name = (token.encode("utf-8") if isinstance(token, str) else token).decode("latin-1")
            self._ids[name] = int(number)
        self._vocab = {str(eos_token): 0, **self._ids}
        self._names = {number: name for name, number in self._vocab.items()}
        self._longest = dict[str, int]()  # two bytes -> the length of the longest token that begins with them
        for name in self._ids:
            self._longest[name[:2]] = max(len(name), self._longest.get(name[:2], 1))
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(eos_token=eos_token, **options)

    @property
    def vocab_size(self):
        return len(self._vocab)

    def get_vocab(self):
        return self._vocab | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        text, at, found = text.encode("utf-8").decode("latin-1"), 0, []
        while at < len(text):
            longest = self._longest.get(text[at : at + 2], 1)
            ends = (end for end in range(at + longest, at, -1) if text[at:end] in self._ids)
            if (end := next(ends, None)) is None:
                raise ValueError(f"the vocabulary has no token for the byte {ord(text[at])}")
            found.append(text[at:end])
            at = end
        return found

    def _convert_token_to_id(self, token):
        return self._vocab.get(token)

    def _convert_id_to_token(self, index):
        return self._names.get(index, "")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).encode("latin-1").decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        out = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCABULARY}"
        if out.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, out)
        return (str(out),)
