"""Vision-RWKV: linear-cost vision backbones and their bidirectional WKV operators (arXiv 2403.02308)."""

__version__ = '0.1.0'

try:
    import timm  # noqa: F401
except ImportError:  # the operators do without
    pass
else:
    from vision_rwkv import timm_models  # noqa: F401
