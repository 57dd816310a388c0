"""Corpora: texts from anywhere, cut into windows of tokens."""

from logitlab.corpora.demo import fetch_corpus
from logitlab.corpora.texts import Corpus, Text, corpus
from logitlab.corpora.windows import Window, Windows, windows

__all__ = ["Corpus", "Text", "Window", "Windows", "corpus", "fetch_corpus", "windows"]
