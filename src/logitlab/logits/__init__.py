"""From decoded rows to statistics over the output space, without ever holding [rows x vocabulary]."""

from logitlab.logits.head import Head, LogitSource
from logitlab.logits.statistics import BACKENDS, Statistics, statistics

__all__ = ["BACKENDS", "Head", "LogitSource", "Statistics", "statistics"]
