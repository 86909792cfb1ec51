"""Vision-RWKV: linear-cost vision backbones and their bidirectional WKV operators (arXiv 2403.02308)."""

__version__ = '0.1.0'
