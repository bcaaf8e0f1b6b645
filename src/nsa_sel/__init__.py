"""The selection branch of Native Sparse Attention (arXiv 2502.11089): a Triton kernel and its PyTorch references."""

from . import reference, spans
from .api import choose_route, selection_attention
from .config import ConfigError, SelConfig
from .errors import UnsupportedError
from .parts import merge
from .recording import record
from .routing import Route

__version__ = "0.2.0"

__all__ = [
    "ConfigError",
    "Route",
    "SelConfig",
    "UnsupportedError",
    "choose_route",
    "merge",
    "record",
    "reference",
    "selection_attention",
    "spans",
]
