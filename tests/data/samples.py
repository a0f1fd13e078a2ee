"""Documents that several test modules build."""

from __future__ import annotations

import numpy as np

from rwkv_miss.data.corpus import Corpus, read_tokens
from rwkv_miss.data.documents import Document, Documents, all_documents
from rwkv_miss.data.store import store_in_memory


def read_documents(path, options):
    """A file's documents as bytes, in memory."""
    corpus = Corpus((str(path),), "bytes", 256, options)
    return all_documents(store_in_memory(corpus.name, read_tokens(corpus)))


def text_of(ids):
    """A plain text of these tokens: all but the first carry loss."""
    return Document(np.array(ids, np.int32), np.arange(len(ids)) > 0)


def cut_out(documents, pieces):
    """The pieces of documents of a store, as documents."""
    return Documents(documents.store, pieces.starts, pieces.starts + pieces.lengths + 1)


def everything(rows):
    """All rows, laid out."""
    return rows.take(np.arange(len(rows)))


def pairs(documents):
    """The (token before, target) of every target that carries loss, in order."""
    return [
        (int(document.ids[i - 1]), int(document.ids[i]))
        for document in documents
        for i in range(1, len(document.ids))
        if document.mask[i]
    ]


def conversation(prompt, answer):
    """A prompt of `prompt` tokens and an answer of `answer` tokens, with ids 1, 2, ...; the answer carries loss."""
    ids = np.arange(1, prompt + answer + 1, dtype=np.int32)
    return Document(ids, ids > prompt)


def steps_of(streams, epoch, accumulate, names):
    """What `names` says of the micro-batches of each optimizer step in an epoch, of all ranks' streams together."""
    found = []
    for stream in streams:
        for _ in range(epoch):
            list(stream)
        found.append([names(batch) for batch in stream])
    return [
        sorted(name for rank in found for share in rank[i : i + accumulate] for name in share)
        for i in range(0, len(found[0]), accumulate)
    ]
