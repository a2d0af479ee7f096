"""Raw text -> tokenizer (SentencePiece's or Hugging Face's) -> token shards -> mixture -> batches.

Two commands write (``python -m data.tokenizer``, ``python -m data.prepare``); training only reads what they wrote,
through :mod:`data.batches`. ``docs/data.md`` describes the files.
"""
