"""Plant a mutant in a module that is imported already: its functions get the code that they would have."""

import gc
import inspect
import sys
from pathlib import Path
from types import CodeType, FunctionType

BODY = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable", "co_flags")


class Swap:
    """Swaps code of the functions that modules below a folder have at this time."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        self._code = {name: _compiled(name) for name in files if name and name.startswith(f"{folder}/")}
        found = (each for each in gc.get_objects() if isinstance(each, FunctionType))
        self._functions = [each for each in found if each.__code__.co_filename in self._code]

    def __call__(self, file: str) -> bool:
        """Give functions the code that the file now has; False where an import of the file would do more than that."""
        name = str(self._folder / file)
        if name not in self._code:
            return True  # its first import is yet to come
        pairs = changed(self._code[name], _compiled(name))
        for was, now in pairs or []:
            for function in self._functions:
                if function.__code__.co_filename == name and _same(function.__code__, was):
                    if now is None or now.co_freevars != was.co_freevars:
                        return False
                    function.__code__ = now
        return pairs is not None


def changed(was: CodeType, now: CodeType) -> list[tuple[CodeType, CodeType | None]] | None:
    """Functions that differ, with what is inside of them; None where something else differs."""
    if _same(was, now):
        return []
    before, after = _inner(was), _inner(now)
    function = bool(was.co_flags & inspect.CO_OPTIMIZED)
    if not function and (_body(was) != _body(now) or len(before) != len(after)):
        return None
    result: list[tuple[CodeType, CodeType | None]] = [(was, now)] if function else []
    if len(before) != len(after):
        return result + [(code, None) for code in before]
    for pair in zip(before, after, strict=True):
        inner = changed(*pair)
        if inner is None:
            return None
        result += inner
    return result


def _same(one: CodeType, other: CodeType) -> bool:
    return one == other and list(one.co_positions()) == list(other.co_positions())


def _inner(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _body(code: CodeType) -> tuple[object, ...]:
    consts = [repr(const) for const in code.co_consts if not isinstance(const, CodeType)]
    return (*(getattr(code, name) for name in BODY), consts)


def _compiled(name: str) -> CodeType:
    return compile(Path(name).read_text(), name, "exec", dont_inherit=True)
