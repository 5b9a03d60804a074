# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Register the model of this package with transformers without importing transformers.

`import medst_trl` has to be cheap, and afterwards `AutoModelForImageTextToText.from_pretrained` has to load a
[`PrototypeLlavaForConditionalGeneration`]. transformers has no entry points for models of other packages, so two steps
wait until they are needed. The first waits for the module of transformers that maps a `model_type` to a configuration.
The second is a stand-in for that configuration, which imports the real one, and the model with it, when it is first
used: transformers imports its Auto classes in the middle of its model code, so a model cannot be imported right after
them.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


_AWAITED = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Register the package's model type now, or once transformers has been imported."""
    if _AWAITED in sys.modules:
        _register(sys.modules[_AWAITED])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(module) -> None:
    module.AutoConfig.register("prototype_llava", _LazyConfig, exist_ok=True)


class _LazyConfig:
    """Stand-in for [`PrototypeLlavaConfig`] until its module is imported, which registers the real one."""

    def __new__(cls, *args, **kwargs):
        return _real_config()(*args, **kwargs)

    @staticmethod
    def from_dict(*args, **kwargs):
        return _real_config().from_dict(*args, **kwargs)

    @staticmethod
    def from_pretrained(*args, **kwargs):
        return _real_config().from_pretrained(*args, **kwargs)


def _real_config():
    from .prototype_llava import PrototypeLlavaConfig

    return PrototypeLlavaConfig


class _AfterImport(MetaPathFinder):
    """Finder of the awaited module that calls `_register` after the module's code has run."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec
