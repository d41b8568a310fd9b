"""Triton's interpreter, made faster."""

from triton import language
from triton.runtime import interpreter

__all__ = ["patch_language_once_per_launch"]


def patch_language_once_per_launch() -> None:
    """Let a device function that a kernel calls find the language as the kernel's launch has patched it.

    The interpreter patches it anew in each such call, which finds nothing new to patch and takes half of the time.
    """
    if hasattr(interpreter, "_LangPatchScope"):  # older releases patch in another way
        interpreter._patch_lang = _Patches(interpreter._patch_lang)


class _Patches:
    """Stands in for the interpreter's function ``_patch_lang``."""

    def __init__(self, patch):
        self.patch = patch
        self.patched = frozenset()  # modules of the language, by the launch that runs now
        self.visible = {}  # those modules that a function sees, by the id of its globals

    def __call__(self, function):
        modules = self._modules(function)
        if self.patched and modules <= self.patched:
            return interpreter._LangPatchScope()
        scope, before = self.patch(function), self.patched
        self.patched = before | modules
        scope.restore = self._ending(scope.restore, before)
        return scope

    def _ending(self, restore, before):
        def end():
            self.patched = before
            restore()

        return end

    def _modules(self, function) -> frozenset[str]:
        key = id(function.__globals__)
        if key not in self.visible:
            seen = [module for module in (language, language.core) if module in _modules_in(function.__globals__)]
            self.visible[key] = frozenset(module.__name__ for module in seen)
        return self.visible[key]


def _modules_in(names: dict) -> list:
    return [value for value in names.values() if isinstance(value, type(language))]
