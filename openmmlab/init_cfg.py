"""MMEngine's `init_cfg` for backbones of ours."""

from copy import deepcopy
from typing import Any


class InitCfg:
    """Put before a backbone of `vision_rwkv` and MMEngine's BaseModule: the backbone takes `init_cfg` as well."""

    def __init__(self, *args: Any, init_cfg: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.init_cfg = deepcopy(init_cfg)
