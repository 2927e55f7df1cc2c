"""Rules for the source: no use of torch's defaults, no unchecked pointer, no function that refers to itself."""

import ast
import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

import unsloth_spectral
from unsloth_spectral.native import abi

SOURCE = Path(unsloth_spectral.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
# Each makes a tensor of torch's default dtype or on its default device unless told otherwise.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros", "bartlett_window", "blackman_window", "hamming_window"),
    *("hann_window", "kaiser_window"),
}
# These cannot be told.
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def torch_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of torch's own functions by their names, however those were imported."""
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in names:
            yield names[node.func.id], node
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch":
            yield node.func.attr, node


def takes_defaults(tree: ast.AST) -> list[str]:
    wrong = []
    for name, call in torch_calls(tree):
        keywords = {keyword.arg for keyword in call.keywords}
        if name in LEGACY or (name in FACTORIES and not {"dtype", "device"} <= keywords):
            wrong.append(f"line {call.lineno}: {ast.unparse(call)}")
    return wrong


def names_itself(tree: ast.AST) -> list[str]:
    """Functions within functions that refer to themselves, and so are garbage that only the collector finds."""
    wrong = []
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = [node for node in ast.walk(outer) if isinstance(node, ast.FunctionDef) and node is not outer]
            wrong += [
                f"line {function.lineno}: {function.name}"
                for function in inner
                for node in ast.walk(function)
                if isinstance(node, ast.Name) and node.id == function.name
            ]
    return sorted(set(wrong))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_tensor_is_made_with_its_dtype_and_device(path: Path) -> None:
    assert takes_defaults(parsed(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_inner_function_refers_to_itself(path: Path) -> None:
    assert names_itself(parsed(path)) == []


def test_where_a_compiled_function_is_called_no_address_is_taken_unchecked() -> None:
    """Modules that import ctypes get addresses from ``native.pointers`` alone."""
    callers = [path for path in MODULES if "import ctypes" in path.read_text(encoding="utf-8")]
    assert {path.name for path in callers} >= {"cpu.py", "kernel.py", "library.py"}
    taking = [
        f"{path.name}, line {node.lineno}"
        for path in callers
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr in ("data_ptr", "untyped_storage", "_cdata")
    ]
    assert taking == []


def filled_in_part(tree: ast.AST) -> list[str]:
    """Where a structure that C++ reads is filled by position, or has fields left out; parts of a block may lack."""
    declared = {structure.__name__: structure._fields_ for structure in abi.STRUCTURES}
    wrong = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "abi" or node.func.attr not in declared:
            continue
        wanted = {name for name, kind in declared[node.func.attr] if not issubclass(kind, ctypes.Structure)}
        keywords = {keyword.arg for keyword in node.keywords}
        if node.args or None in keywords or (keywords and not wanted <= keywords):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_structures_that_the_kernel_reads_are_filled_by_keyword_and_wholly(path: Path) -> None:
    assert filled_in_part(parsed(path)) == []


def test_the_checks_themselves_see_breaches() -> None:
    for line in ("abi.CodedValues(1, 2, 3, 4)", "abi.CodedValues(streams=1)", "abi.CodedValues(**fields)"):
        assert filled_in_part(ast.parse(line)), line
    for line in (
        "abi.Rotation()",
        "abi.Block(num_tokens=1, count=None, is_coded=False)",
        "ast.Call(1)",
        "abi.differences(2)",
    ):
        assert not filled_in_part(ast.parse(line)), line
    for line in (
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.arange(3, device=x.device)",
        "torch.tensor([0.5], **options)",
        "torch.Tensor([1.0])",
        "from torch import eye as unit\nunit(3)",
    ):
        assert takes_defaults(ast.parse(line)), line
    for line in (
        "torch.zeros(3, dtype=torch.float32, device='cpu')",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "np.zeros(3)",
        "torch.cat([x])",
    ):
        assert not takes_defaults(ast.parse(line)), line
    nested = (
        "def flatten(field):\n    def plain(field):\n        return [plain(x) for x in field]\n    return plain(field)"
    )
    assert names_itself(ast.parse(nested)) == ["line 2: plain"]
    assert not names_itself(ast.parse("def plain(field):\n    return [plain(x) for x in field]"))


# Names that belong to torch, to a protocol, or to the objects of this library.
NOT_OF_TRANSFORMERS = {"_C", "_DisableTorchDispatch", "_orig_mod", "_version", "_data", "_scale", "_shift"}


def private_names_of_others(tree: ast.AST) -> set[str]:
    """Attributes with a leading underscore that ``tree`` uses and does not define."""
    definitions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    definitions |= {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
    }
    definitions |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    return private - definitions - NOT_OF_TRANSFORMERS


@pytest.mark.parametrize(
    "path", sorted((SOURCE / "integrations").rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE))
)
def test_private_names_of_transformers_are_used_in_one_file(path: Path) -> None:
    if path.name != "private_api.py":
        assert private_names_of_others(parsed(path)) == set()


def test_the_check_for_private_names_sees_breaches() -> None:
    assert private_names_of_others(ast.parse("model._can_set_attn_implementation()")) == {
        "_can_set_attn_implementation"
    }
    assert private_names_of_others(ast.parse("def _f(): ...\nself._x = 1\nother._x\nself._f()")) == set()
