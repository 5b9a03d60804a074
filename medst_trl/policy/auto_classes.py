# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes the model of this package known to transformers without importing transformers.

`import medst_trl` costs nothing, yet from then on `AutoModelForImageTextToText.from_pretrained` is to load a
[`PrototypeLlavaForConditionalGeneration`]. transformers has no entry points for models of other packages, so two steps
are left until they are needed. The first waits for the one module of transformers that maps a `model_type` to a
configuration. The second is a stand-in for that configuration, which imports the real one, and the model with it, when
the first is made: transformers imports its Auto classes from the middle of its model code, so that right after them a
model cannot be imported yet.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


_AWAITED = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Registers the package's model type now or, where transformers is not imported yet, once it is."""
    if _AWAITED in sys.modules:
        _register(sys.modules[_AWAITED])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(module) -> None:
    module.AutoConfig.register("prototype_llava", _PrototypeLlavaConfigWhenUsed, exist_ok=True)


class _PrototypeLlavaConfigWhenUsed:
    """Stands for [`PrototypeLlavaConfig`] until its module is imported, which puts the real one in this place."""

    def __new__(cls, *args, **kwargs):
        return cls._real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args, **kwargs):
        return cls._real().from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls._real().from_pretrained(*args, **kwargs)

    @staticmethod
    def _real():
        from .prototype_llava import PrototypeLlavaConfig

        return PrototypeLlavaConfig


class _AfterImport(MetaPathFinder):
    """Finds the awaited module as Python would, and calls `_register` when its code has run."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register
        return spec
