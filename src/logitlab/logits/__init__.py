"""From decoded rows to statistics over the output space, without ever holding [rows x vocabulary]."""

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.statistics import BACKENDS, PRECISIONS, Asked, Statistics, statistics

__all__ = ["BACKENDS", "PRECISIONS", "Asked", "Head", "LogitSource", "Statistics", "statistics"]
